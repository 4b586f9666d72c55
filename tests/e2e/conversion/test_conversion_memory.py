"""A conversion holds one block of weights, not the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.conversion.memory import convert_apart, gptq, make_llama

pytestmark = [pytest.mark.slow, pytest.mark.e2e]


def growth(
    shape: dict[str, int], layers: int, recipe: Any, text: Path | None, place: Path
) -> tuple[int, int]:
    """By how many bytes the peak and the model grow from one layer to so many."""
    peaks, sizes = [], []
    for count in (1, layers):
        model, out = place / f"model{count}", place / f"out{count}"
        sizes.append(make_llama(model, {**shape, "num_hidden_layers": count}, count, 4096))
        peaks.append(convert_apart(model, recipe, out, text)["peak_bytes"])
    return peaks[1] - peaks[0], sizes[1] - sizes[0]


def test_rtn_needs_no_more_memory_for_more_layers(tmp_path: Path) -> None:
    peak, size = growth({"hidden_size": 1024, "intermediate_size": 4096}, 6, "int8", None, tmp_path)
    assert peak < 0.25 * size


def test_gptq_needs_no_more_memory_for_more_layers(tmp_path: Path, some_text: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(some_text.read_text() * 4)
    recipe = gptq(2)
    recipe["calibration"]["length"] = 128
    recipe["modules"][0]["algorithm"] = {"algorithm": "gptq", "sweeps": 0}  # time, and no memory
    # Peaks of the same conversion differ by as much as two layers take.
    peak, size = growth({"hidden_size": 768, "intermediate_size": 1536}, 5, recipe, text, tmp_path)
    assert peak < size, "half of what they take as float32"
