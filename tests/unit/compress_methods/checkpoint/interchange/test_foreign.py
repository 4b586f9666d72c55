"""Checkpoints that other tools wrote are read as these tools read them.

What is in tests/assets/interchange was written by the tools themselves, see README.md there.
"""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compress_methods import convert, load_model
from compress_methods.checkpoint.interchange import DecodedEntry
from compress_methods.checkpoint.safetensors import read_tensors, write_tensors
from compress_methods.checkpoint.source import open_source, resolve_model
from compress_methods.errors import CheckpointError
from compress_methods.model.skeleton import build_skeleton

ASSETS = Path(__file__).parents[4] / "assets" / "interchange"
GGUF = pytest.mark.skipif(find_spec("gguf") is None, reason="needs the package gguf")
EVERY = [
    pytest.param(path.parent.name, marks=GGUF if "gguf" in path.parent.name else ())
    for path in sorted(ASSETS.glob("*/expected.json"))
]
EXACT = {
    "awq": "int4 g32 asym",
    "bitsandbytes-int8": "int8 row",
    "bitsandbytes-nf4": "bnb_nf4 g64",
    "compressed-tensors-fp8": "fp8 row",
    "compressed-tensors-int4-actorder": "reordered int4 g32 asym",
    "compressed-tensors-int8": "int8 row",
    "compressed-tensors-mxfp4": "mxfp4",
    "compressed-tensors-nvfp4": "nvfp4",
    "gguf-q4_0": "int4 g32",
    "gguf-q5_1": "shifted int5 g32",
    "gptq-desc-act": "reordered int4 g32 asym",
    "gptq-v2-3bit": "int3 g32",
    "hqq": "shifted int4 g64",
}
"""Formats of ours that hold them."""


def logprobs(model: Any, prompt: list[int]) -> Tensor:
    ids = torch.tensor([prompt])
    with torch.no_grad():
        scores = model(ids).logits[0, :-1].log_softmax(-1)
    return scores.gather(1, ids[0, 1:, None])[:, 0]


def expected(name: str) -> tuple[list[int], Tensor]:
    found = json.loads((ASSETS / name / "expected.json").read_text())
    return found["prompt"], torch.tensor(found["logprobs"])


@pytest.mark.parametrize("name", EVERY)
def test_values_are_those_of_the_tool(name: str) -> None:
    prompt, wanted = expected(name)
    model = load_model(resolve_model(ASSETS / name))
    assert (logprobs(model, prompt) - wanted).abs().max() < 1e-3


@pytest.mark.parametrize("name", EVERY)
def test_the_format_that_holds_a_matrix_is_known_before_it_is_read(name: str) -> None:
    folder = resolve_model(ASSETS / name)
    source = open_source(folder, build_skeleton(folder), name, False)
    decoded = [entry for entry in source.entries.values() if isinstance(entry, DecodedEntry)]
    assert len(decoded) == (8 if "gguf" in name else 7)  # of llama.cpp's the token table, too
    for entry in decoded:
        fmt, solution = entry.layout.read(entry.module, entry.entries)
        told = entry.layout.format(entry.module, entry.entries)
        assert told == fmt
        assert told.describe() == EXACT[name]
        values = fmt.matrix(solution)
        assert torch.equal(fmt.unpack(fmt.pack(solution)), values)
        assert values.shape == entry.shape


def test_a_matrix_is_decoded_once_however_many_slabs_it_is_read_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = open_source(ASSETS / "awq", build_skeleton(ASSETS / "awq"), "awq", False)
    entry = source.entry("model.layers.0.mlp.up_proj.weight")
    whole, calls, values = entry.read(), [], DecodedEntry.values
    monkeypatch.setattr(DecodedEntry, "values", lambda self: calls.append(1) or values(self))
    slabs = list(entry.slabs(8, 4096))
    assert len(slabs) > 4
    assert torch.equal(torch.cat([slab for _, slab in slabs]), whole)
    entry.copy_to(torch.empty(entry.shape))
    assert len(calls) == 2


def test_a_foreign_checkpoint_is_a_source(tmp_path: Path) -> None:
    fmt = {"format": "integer", "bits": 8, "group_size": -1}
    recipe = {"formats": {"w": fmt}, "modules": [{"match": "blocks", "format": "w"}]}
    recipe["calibration"] = {"held_out": 0}  # type: ignore[assignment]
    name = "gptq-desc-act"
    report = convert(ASSETS / name, recipe, tmp_path / "out", quiet=True)
    assert all(found["weight_error"] < 1e-4 for found in report["modules"].values())
    prompt, wanted = expected(name)
    assert (logprobs(load_model(tmp_path / "out"), prompt) - wanted).abs().max() < 0.1
    assert "quantization_config" in json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.parametrize(
    ("name", "leaf"),
    [
        ("awq", "scales"),
        ("gptq-desc-act", "qzeros"),
        ("compressed-tensors-int8", "weight_scale"),
        ("compressed-tensors-fp8", "weight_scale"),
        ("bitsandbytes-nf4", "weight.absmax"),
        ("bitsandbytes-int8", "SCB"),
        ("hqq", "scale"),
    ],
)
def test_a_tensor_of_another_shape_is_one_line(name: str, leaf: str, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(ASSETS / name, tmp_path / "copy"))
    tensors = read_tensors(copy / "model.safetensors")
    key = f"model.layers.0.mlp.up_proj.{leaf}"
    tensors[key] = tensors[key][:3].contiguous()
    write_tensors(copy / "model.safetensors", tensors)
    with pytest.raises(CheckpointError) as caught:
        load_model(copy)
    assert "\n" not in str(caught.value)
    assert "up_proj" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "key", "value", "words"),
    [
        ("awq", "version", "gemv", "version is 'gemv' with 4 bits, expected 'gemm' with 4"),
        ("gptq-v2-3bit", "checkpoint_format", "marlin", "checkpoint_format is 'marlin', expected"),
        ("compressed-tensors-int8", "config_groups", {}, "no config_groups has model.layers.0"),
    ],
)
def test_packings_that_are_not_read_are_refused(
    name: str, key: str, value: Any, words: str, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(ASSETS / name, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"][key] = value
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=words) as caught:
        load_model(copy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "leaf", "words"),
    [
        ("awq", "qzeros", "up_proj.qzeros is missing"),
        ("gptq-desc-act", "scales", "up_proj.scales is missing"),
        ("compressed-tensors-nvfp4", "weight_scale", "up_proj.weight_scale is missing"),
        ("hqq", "zero", "up_proj.zero is missing"),
        ("bitsandbytes-nf4", "weight.absmax", "up_proj.weight.absmax is missing"),
    ],
)
def test_what_is_missing_is_one_line(name: str, leaf: str, words: str, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(ASSETS / name, tmp_path / "copy"))
    tensors = read_tensors(copy / "model.safetensors")
    del tensors[f"model.layers.0.mlp.up_proj.{leaf}"]
    write_tensors(copy / "model.safetensors", tensors)
    with pytest.raises(CheckpointError, match=words) as caught:
        load_model(copy)
    assert "\n" not in str(caught.value)
