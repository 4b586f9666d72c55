"""A search chooses by some of the held-out text and reports on the rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from compress_methods import convert
from compress_methods.errors import RecipeError

SMALL = {"samples": 4, "length": 64, "held_out": 2}


def searched(**calibration: int) -> dict[str, Any]:
    return {
        "stages": [{"transform": "width", "ffn": "search"}],
        "calibration": {**SMALL, **calibration},
        "prune_to": {"perplexity_increase": "10%"},
    }


def test_the_report_is_of_text_that_did_not_choose(
    novels_8m: Path, some_text: Path, tmp_path: Path
) -> None:
    """Of two held-out sequences the first chooses, the second is measured for the report."""
    out = tmp_path / "out"
    report = convert(novels_8m, searched(), out, calibration=some_text, quiet=True)
    assert report == json.loads((out / "report.json").read_text())
    held, found = report["held_out"], report["search"]
    chose = found["chosen_on"]
    assert chose["perplexity"] <= 1.1 * chose["base_perplexity"]
    (point,) = [p for p in found["points"] if p["level"] == found["level"]]
    assert point["perplexity"] == chose["perplexity"] != held["perplexity"]
    assert held["base_perplexity"] != chose["base_perplexity"]
    assert held["tokens"] == chose["tokens"] == SMALL["length"] - 1
    card = (out / "README.md").read_text()
    assert f"| {held['base_perplexity']:.3f} | {held['perplexity']:.3f} |" in card
    assert "nor the search that chose" in card


def test_one_sequence_cannot_be_halved(novels_8m: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="held_out is 1, expected 2 or more"):
        convert(novels_8m, searched(held_out=1), tmp_path / "out", quiet=True)
