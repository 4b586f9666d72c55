"""The language model inside a vision-language model: found, calibrated by text, and packed; what
stands beside it comes out as it went in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from compress_methods import convert
from compress_methods.checkpoint.compressed import open_compressed
from compress_methods.checkpoint.safetensors import read_tensors
from compress_methods.errors import RecipeError
from tests.e2e.support.vision import VISION, make_vision

W3 = {"format": "integer", "bits": 3, "group_size": 32}


def recipe(algorithm: str, match: Any = "blocks") -> dict[str, Any]:
    return {
        "formats": {"w3": W3},
        "modules": [{"match": match, "format": "w3", "algorithm": algorithm}],
        "calibration": {"samples": 16, "length": 32, "held_out": 4},
    }


@pytest.mark.parametrize("name", VISION)
def test_the_language_model_alone_is_packed(name: str, some_text: Path, tmp_path: Path) -> None:
    model = make_vision(name, tmp_path / "model")
    lost = {}
    for algorithm in ("rtn", "gptq"):
        out = tmp_path / algorithm
        report = convert(model, recipe(algorithm), out, calibration=some_text, quiet=True)
        assert len(report["modules"]) == 2 * 7
        assert all(
            module.partition(".layers.")[0].endswith(("language_model", "language_model.model"))
            for module in report["modules"]
        )
        lost[algorithm] = report["held_out"]["kl"]
    assert 0 < lost["gptq"] < lost["rtn"]
    before = read_tensors(model / "model.safetensors")
    kept = {name: t for name, t in before.items() if "visual" in name or "vision" in name}
    assert kept
    after = open_compressed(tmp_path / "gptq").dense
    assert all(torch.equal(tensor, after[name].read()) for name, tensor in kept.items())
    assert (tmp_path / "gptq" / "preprocessor_config.json").read_text() == "{}"


def test_the_vision_tower_is_kept(tmp_path: Path) -> None:
    model = make_vision("llava", tmp_path / "model")
    with pytest.raises(RecipeError, match="beside the language model is kept as it is"):
        convert(model, recipe("rtn", r"re:.*vision_tower.*fc1"), tmp_path / "out", quiet=True)
