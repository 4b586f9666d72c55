"""Shapes without weights, and of weights that another tool packed, are those of the model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from compress_methods.checkpoint.safetensors import read_tensors, write_tensors
from compress_methods.conversion.job import open_job
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
    block: dict[str, Any] = {"bits": 4, "group_size": 32} if method == "awq" else {}
    config["quantization_config"] = {"quant_method": method, **block}
    (model / "config.json").write_text(json.dumps(config))
    found = load_shape(str(model))
    assert found.parameters == original.parameters
    assert found.quantized == method
    assert found.weight_bytes == sum(tensor.nbytes for tensor in tensors.values())
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copyfile(model / "config.json", bare / "config.json")
    alone = load_shape(str(bare))
    assert sizes(alone) == sizes(found)
    for shape in (found, alone):  # a recipe starts from the values that were packed
        packed, plain = (apply_recipe(s, RECIPE).weight_bytes for s in (shape, original))
        assert packed == plain
    lost = next(key for key in tensors if "layers.1" in key and "norm" in key)
    del tensors[lost]
    write_tensors(model / "model.safetensors", tensors)
    with pytest.raises(CheckpointError, match=f"holds nothing of {lost}"):
        load_shape(str(model))


CONFIGS: dict[str, tuple[dict[str, Any], float, float]] = {
    "gptq": ({"quant_method": "gptq", "bits": 3, "group_size": 128}, 3 / 8 + 2.375 / 128, 1),
    "fp8": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, 1, 0),
    "mxfp4": ({"quant_method": "mxfp4"}, 2, 0),
    "nf4": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 0.5 + 4 / 64, 0),
    "int4": (
        {
            "quant_method": "compressed-tensors",
            "ignore": ["lm_head", "re:.*o_proj"],
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {"num_bits": 4, "type": "int", "group_size": 32, "symmetric": False},
                }
            },
        },
        0.5 + 2.5 / 32,
        0,
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_config_alone_tells_what_another_tool_packed(name: str, tmp_path: Path) -> None:
    block, size, places = CONFIGS[name]
    (tmp_path / "m").mkdir()
    config = json.loads((model_of("llama", tmp_path) / "config.json").read_text())
    bare = tmp_path / "m"
    (bare / "config.json").write_text(json.dumps({**config, "quantization_config": block}))
    matrices = {m.module.rpartition(".")[2]: m for m in load_shape(str(bare)).matrices}
    up, out = matrices["up_proj"], matrices["o_proj"]
    scales = 4 * 2 / (256 * 128) if name == "fp8" else 4 * places / up.rows
    assert up.itemsize == pytest.approx(size + scales)
    assert (out.itemsize == 2) == (name in ("int4", "mxfp4"))
    assert matrices["lm_head"].itemsize == matrices["embed_tokens"].itemsize == 2


def test_a_kind_of_packing_that_is_not_known_is_said_so(tmp_path: Path, novels_8m: Path) -> None:
    config = json.loads((novels_8m / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "quanto"}})
    )
    with pytest.raises(CheckpointError, match="quantized by 'quanto'; without its files") as caught:
        load_shape(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["falcon_h1", "jamba", "minicpm3"])
def test_recipes_leave_what_vllm_takes_uncompressed_alone(name: str, tmp_path: Path) -> None:
    model = model_of(name, tmp_path)
    int8 = {"format": "integer", "bits": 8, "group_size": -1}
    rules = [{"match": ["blocks", "experts"], "format": "w"}]
    asked = {"formats": {"w": int8}, "modules": rules, "on_unfit": "keep"}
    made = {job.slot.module for job in open_job(model, asked).plan.jobs}
    (tmp_path / "recipe.yaml").write_text(json.dumps(asked))
    parts = apply_recipe(load_shape(str(model)), str(tmp_path / "recipe.yaml")).parts
    planned = {p.matrix.name(layer) for p in parts if p.format for layer in p.matrix.layers}
    assert planned == {n for n in made if ".experts." not in n or ".experts.0." in n}


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
