"""A head that config.json ties, but that is stored with other values, is the head."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from compress_methods import convert, load_model
from compress_methods.checkpoint.safetensors import read_tensors, write_tensors
from tests.e2e.support.tiny import TIED_LLAMA, make_model

RECIPE = {
    "formats": {"w8": {"format": "integer", "bits": 8, "group_size": -1}},
    "calibration": {"held_out": 0},
}


def model_with_a_head(directory: Path, scale: float) -> Path:
    """A tied Llama whose file holds a head too: `scale` times the embedding."""
    make_model("Llama", directory, **TIED_LLAMA)
    path = directory / "model.safetensors"
    tensors = read_tensors(path)
    tensors["lm_head.weight"] = scale * tensors["model.embed_tokens.weight"]
    write_tensors(path, tensors)
    return directory


@pytest.mark.parametrize("match", ["blocks", "embedding"])
def test_the_stored_head_is_kept(tmp_path: Path, match: str) -> None:
    model = model_with_a_head(tmp_path / "model", -2.0)
    recipe = {**RECIPE, "modules": [{"match": match, "format": "w8"}]}
    report = convert(model, recipe, tmp_path / "out", quiet=True)
    assert "lm_head.weight" not in report["dropped"]
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    )
    found = load_model(tmp_path / "out").lm_head.weight
    expected = read_tensors(model / "model.safetensors")["lm_head.weight"]
    assert torch.equal(found, expected)


def test_logits_are_those_of_the_stored_head(tmp_path: Path) -> None:
    model = model_with_a_head(tmp_path / "model", -2.0)
    plain = make_model("Llama", tmp_path / "plain", **TIED_LLAMA)
    ids = torch.arange(2, 30)[None]
    with torch.no_grad():
        found, tied = load_model(model)(ids).logits, load_model(plain)(ids).logits
    assert torch.allclose(found, -2 * tied, atol=1e-5)


def test_an_equal_head_is_stored_once(tmp_path: Path) -> None:
    model = model_with_a_head(tmp_path / "model", 1.0)
    recipe = {**RECIPE, "modules": [{"match": "embedding", "format": "w8"}]}
    report = convert(model, recipe, tmp_path / "out", quiet=True)
    assert "lm_head.weight" in report["dropped"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True
