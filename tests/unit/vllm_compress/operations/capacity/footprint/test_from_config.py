"""Shapes without weights, and of weights that another tool packed, are those of the model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from compress_methods.checkpoint.safetensors import read_tensors, write_tensors
from compress_methods.errors import CheckpointError
from tests.e2e.support.tiny import make_model
from tests.e2e.support.zoo import MIXTURES, ZOO
from vllm_compress.operations.capacity.footprint.shapes import ModelShape, load_shape
from vllm_compress.operations.capacity.footprint.storage import apply_recipe, as_it_is

RECIPE = "int4-rtn"
NAMES = ("llama", "gemma2", "gpt2", "falcon-new", "minicpm3", "mixtral", "falcon_h1")


def model_of(name: str, folder: Path) -> Path:
    kind, values = {**ZOO, **MIXTURES}[name]
    return make_model(kind, folder / "model", **values)


def sizes(shape: ModelShape) -> tuple[int, ...]:
    return (
        shape.parameters, shape.weight_bytes, shape.kv_layers, shape.kv_values,
        as_it_is(shape).weight_bytes,
    )  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_config_alone_tells_what_the_weights_tell(name: str, tmp_path: Path) -> None:
    model = model_of(name, tmp_path)
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copyfile(model / "config.json", bare / "config.json")
    whole, alone = load_shape(str(model)), load_shape(str(bare))
    assert sizes(alone) == sizes(whole)
    recipes = [apply_recipe(shape, RECIPE).weight_bytes for shape in (alone, whole)]
    assert recipes[0] == recipes[1] < whole.weight_bytes


def awq(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    rows, cols = weight.shape
    return {
        "qweight": torch.zeros(cols, rows // 8, dtype=torch.int32),
        "qzeros": torch.zeros(cols // 32, rows // 8, dtype=torch.int32),
        "scales": torch.zeros(cols // 32, rows, dtype=torch.float16),
    }


def fp8(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"weight": weight.to(torch.float8_e4m3fn), "weight_scale_inv": torch.ones(1, 1)}


@pytest.mark.parametrize(("method", "pack"), [("awq", awq), ("fp8", fp8)])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_what_others_packed_has_the_models_shape(
    name: str, method: str, pack: Any, tmp_path: Path
) -> None:
    model = model_of(name, tmp_path)
    original = load_shape(str(model))
    tensors: dict[str, torch.Tensor] = {}
    for key, value in read_tensors(model / "model.safetensors").items():
        module, _, leaf = key.rpartition(".")
        if "layers" in key and value.dim() == 2 and leaf == "weight" and "gate.w" not in key:
            tensors |= {f"{module}.{part}": tensor for part, tensor in pack(value).items()}
        else:
            tensors[key] = value.to(torch.bfloat16)
    write_tensors(model / "model.safetensors", tensors)
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method}
    (model / "config.json").write_text(json.dumps(config))
    found = load_shape(str(model))
    assert found.parameters == original.parameters
    assert found.quantized == method
    assert found.weight_bytes == sum(tensor.nbytes for tensor in tensors.values())
    lost = next(key for key in tensors if "layers.1" in key and "norm" in key)
    del tensors[lost]
    write_tensors(model / "model.safetensors", tensors)
    with pytest.raises(CheckpointError, match=f"holds nothing of {lost}"):
        load_shape(str(model))


@pytest.mark.parametrize(
    "wrong",
    [{"model_type": "unheard-of"}, {"hidden_size": 7}, {"rope_parameters": 5}, {"dtype": "zz"},
     {"num_hidden_layers": None}],
)  # fmt: skip
def test_a_model_that_nobody_can_build_is_said_so(
    wrong: dict[str, Any], novels_8m: Path, tmp_path: Path
) -> None:
    config = json.loads((novels_8m / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **wrong}))
    with pytest.raises(CheckpointError, match="transformers cannot build a model from it"):
        load_shape(str(tmp_path))
