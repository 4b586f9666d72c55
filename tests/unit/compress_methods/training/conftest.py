"""Fixtures of the tests of training."""

from __future__ import annotations

from pathlib import Path

import pytest

from compress_methods import convert


@pytest.fixture(scope="module")
def pruned(novels_8m: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three of the model's layers: a student with something to learn."""
    out = tmp_path_factory.mktemp("pruned") / "out"
    calibration = {"samples": 2, "length": 32, "held_out": 1}
    stage = {"transform": "depth", "keep": [0, 4, 7]}
    convert(novels_8m, {"stages": [stage], "calibration": calibration}, out, quiet=True)
    return out
