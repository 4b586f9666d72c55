"""A model that was turned, scaled and packed is served as transformers computes it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from compress_methods import convert
from tests.e2e.models.test_matrix import WORST, difference
from tests.e2e.support.engine import Engine
from tests.e2e.support.tiny import INT4, TIED_LLAMA, make_model


@pytest.mark.e2e
@pytest.mark.slow
def test_turned_scaled_and_packed(
    engine: Engine, novels_8m: Path, some_text: Path, tmp_path: Path
) -> None:
    model = make_model("Llama", tmp_path / "model", **{**TIED_LLAMA, "vocab_size": 4096})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(novels_8m / name, model)
    packing = {"formats": {"w4": INT4}, "modules": [{"match": "blocks", "format": "w4"}]}
    recipe = {
        "stages": [{"transform": "rotation"}, {"transform": "awq"}, packing],
        "calibration": {"samples": 4, "length": 64, "held_out": 2},
    }
    convert(model, recipe, tmp_path / "out", calibration=some_text, quiet=True)
    assert difference(engine, tmp_path / "out") < WORST
