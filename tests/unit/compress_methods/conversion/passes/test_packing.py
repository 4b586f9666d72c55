"""Matrices of a block solved one after another: what is in memory meanwhile."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest

from compress_methods import convert
from compress_methods.algorithms.gptq import GPTQ
from compress_methods.algorithms.statistics import Drift, Seen
from compress_methods.conversion.passes.comparing import Comparer
from compress_methods.formats import Format

FIRST = r"re:model\.layers\.0\..*_proj"
GPTQ_ONCE = {"algorithm": "gptq", "sweeps": 0}


def test_the_widest_matrix_is_solved_after_what_compares_is_gone(
    novels_8m: Path, tmp_path: Path, some_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Drift is as large as a Hessian, and the original's block as large as the block."""
    found: list[tuple[int, int, int]] = []
    prepare = GPTQ.prepare

    def counted(self: GPTQ, seen: Seen, fmt: Format) -> Any:
        alive = gc.get_objects()
        (hessian,) = (statistic.result() for statistic in seen.values())
        drifts, comparers = (sum(type(o) is c for o in alive) for c in (Drift, Comparer))
        del alive  # in which is this frame, too
        found.append((len(hessian), drifts, comparers))
        return prepare(self, seen, fmt)

    monkeypatch.setattr(GPTQ, "prepare", counted)
    recipe = {
        "formats": {"w": {"format": "integer", "bits": 4, "group_size": 32}},
        "modules": [{"match": FIRST, "format": "w", "algorithm": GPTQ_ONCE}],
        "calibration": {"samples": 2, "length": 32, "held_out": 0},
    }
    convert(novels_8m, recipe, tmp_path / "out", calibration=some_text, device="cpu", quiet=True)
    widest = max(cols for cols, _, _ in found)
    last = [(drifts, comparers) for cols, drifts, comparers in found if cols == widest]
    assert last == [(0, 0)] * len(last)
    assert (1, 1) in [(drifts, comparers) for _, drifts, comparers in found]
