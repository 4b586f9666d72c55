"""A conversion holds one block of weights, not the model."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.conversion.memory import convert_apart, gptq, make_llama

pytestmark = [pytest.mark.slow, pytest.mark.e2e]


def test_rtn_needs_no_more_memory_for_more_layers(tmp_path: Path) -> None:
    peaks, sizes = [], []
    for layers in (1, 6):
        shape = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": layers}
        model, out = tmp_path / f"model{layers}", tmp_path / f"out{layers}"
        sizes.append(make_llama(model, shape, shards=layers, vocabulary=1024))
        peaks.append(convert_apart(model, "int8", out, None)["peak_bytes"])
    assert peaks[1] - peaks[0] < 0.25 * (sizes[1] - sizes[0])


def test_gptq_needs_no_more_memory_for_more_layers(tmp_path: Path, some_text: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(some_text.read_text() * 4)
    recipe = gptq(2)
    recipe["calibration"]["length"] = 128
    recipe["modules"][0]["algorithm"] = {"algorithm": "gptq", "sweeps": 0}  # time, and no memory
    peaks, sizes = [], []
    for layers in (1, 5):  # peaks of the same conversion differ by as much as two layers take
        shape = {"hidden_size": 768, "intermediate_size": 1536, "num_hidden_layers": layers}
        model, out = tmp_path / f"model{layers}", tmp_path / f"out{layers}"
        sizes.append(make_llama(model, shape, shards=1, vocabulary=4096))
        peaks.append(convert_apart(model, recipe, out, text)["peak_bytes"])
    assert peaks[1] - peaks[0] < sizes[1] - sizes[0], "half of what they take as float32"
