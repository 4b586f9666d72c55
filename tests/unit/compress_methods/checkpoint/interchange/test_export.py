"""Results in other tools' layouts: these tools read the values that ours would have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from compress_methods import convert, load_model
from compress_methods.checkpoint.safetensors import read_tensors
from compress_methods.errors import CompressError
from tests.e2e.support.tiny import make_model

INT4 = {"format": "integer", "bits": 4, "group_size": 32}
INT8 = {"format": "integer", "bits": 8, "group_size": -1}
FP8 = {"format": "float", "kind": "fp8"}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "int4": ("compressed-tensors", INT4),
    "int4 asym": ("compressed-tensors", {**INT4, "symmetric": False}),
    "int8": ("compressed-tensors", INT8),
    "int8 dynamic": ("compressed-tensors", {**INT8, "activations": "int8"}),
    "fp8": ("compressed-tensors", FP8),
    "fp8 blocks": ("compressed-tensors", {**FP8, "group_size": 128, "group_rows": 128}),
    "mxfp4": ("compressed-tensors", {"format": "float", "kind": "mxfp4"}),
    "gptq": ("gptq", {**INT4, "scale_dtype": "float16"}),
    "gptq 3 bits": ("gptq", {**INT4, "bits": 3, "scale_dtype": "float16", "symmetric": False}),
}
IDS = torch.arange(2, 34)[None]


def recipe(fmt: dict[str, Any], match: Any = "blocks") -> dict[str, Any]:
    rules = [{"match": match, "format": "w"}]
    return {"formats": {"w": fmt}, "modules": rules, "calibration": {"held_out": 0}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("Llama", tmp_path_factory.mktemp("model") / "m")


@pytest.mark.parametrize("case", list(CASES))
def test_what_is_exported_has_the_values_of_our_own_result(
    case: str, model: Path, tmp_path: Path
) -> None:
    layout, fmt = CASES[case]
    convert(model, recipe(fmt), tmp_path / "own", quiet=True)
    convert(model, recipe(fmt), tmp_path / "theirs", layout=layout, quiet=True)
    block = json.loads((tmp_path / "theirs" / "config.json").read_text())["quantization_config"]
    assert block["quant_method"] == layout
    own, theirs = load_model(tmp_path / "own"), load_model(tmp_path / "theirs")
    for mine, other in zip(own.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("case", ["int4", "int4 asym", "int8", "fp8"])
def test_the_library_of_compressed_tensors_decompresses_to_our_values(
    case: str, model: Path, tmp_path: Path
) -> None:
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    convert(model, recipe(CASES[case][1]), tmp_path / "o", layout="compressed-tensors", quiet=True)
    block = json.loads((tmp_path / "o" / "config.json").read_text())["quantization_config"]
    (group,) = block["config_groups"].values()
    scheme = quantization.QuantizationScheme(**{k: v for k, v in group.items() if k != "format"})
    compressor = compressors.BaseCompressor.get_value_from_registry(group["format"])
    tensors = read_tensors(tmp_path / "o" / "block-00001.safetensors")
    values, checked = dict(load_model(tmp_path / "o").named_parameters()), 0
    for name in [name for name in values if name.startswith("model.layers.1.")]:
        prefix = name.removesuffix("weight")
        if f"{prefix}weight_scale" not in tensors:
            continue
        parts = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        parts["weight_scale"] = parts["weight_scale"].float()
        assert torch.equal(compressor.decompress(parts, scheme)["weight"].float(), values[name])
        checked += 1
    assert checked == 7


def test_transformers_loads_the_result(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    fmt = {**INT4, "symmetric": False}
    convert(model, recipe(fmt), tmp_path / "o", layout="compressed-tensors", quiet=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "o", dtype=torch.float32)
    with torch.no_grad():
        wanted = load_model(tmp_path / "o")(IDS).logits
        assert (loaded(IDS).logits - wanted).abs().max() < 0.1


@pytest.mark.parametrize(
    ("layout", "fmt", "match", "words"),
    [
        ("gptq", INT8 | {"activations": "int8"}, "blocks", "has no equal in gptq"),
        ("compressed-tensors", INT4 | {"bits": 3}, "blocks", "no equal in compressed-tensors"),
        ("compressed-tensors", INT8, ["blocks", "embedding"], "holds no token table"),
        ("awq", INT4, "blocks", "awq checkpoints can be read, not written"),
        ("gtpq", INT4, "blocks", "unknown layout 'gtpq'"),
    ],
)
def test_what_has_no_equal_is_refused_before_any_work(
    layout: str, fmt: dict[str, Any], match: Any, words: str, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(CompressError, match=words) as caught:
        convert(model, recipe(fmt, match), tmp_path / "o", layout=layout, quiet=True)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "o").exists()


def test_gptq_holds_one_format(model: Path, tmp_path: Path) -> None:
    rules = [{"match": r"re:.*mlp.*", "format": "a"}, {"match": "blocks", "format": "b"}]
    formats = {"a": INT4, "b": {**INT4, "bits": 8}}
    two = {"formats": formats, "modules": rules, "calibration": {"held_out": 0}}
    with pytest.raises(CompressError, match="gptq holds one format, the recipe has int4 g32, int8"):
        convert(model, two, tmp_path / "o", layout="gptq", quiet=True)
    assert not (tmp_path / "o").exists()
