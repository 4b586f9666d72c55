"""Layers that share matrices are served, by one rank and by two, as transformers computes with the
stored ones; pipeline stages, which cannot share, are refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from compress_methods import convert
from tests.e2e.support.engine import Engine
from tests.e2e.support.served import check_served

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

EXACT = {"VLLM_COMPRESS_KERNEL": "cpu_exact"}
INT4 = {"format": "integer", "bits": 4, "group_size": 64}


@pytest.fixture(scope="module")
def model(novels_8m: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All layers have the matrices of one."""
    out = tmp_path_factory.mktemp("sharing") / "out"
    packing = {"formats": {"w4": INT4}, "modules": [{"match": "blocks", "format": "w4"}]}
    recipe = {
        "stages": [{"transform": "sharing", "share": 7, "reach": 7}, packing],
        "calibration": {"samples": 2, "length": 64, "held_out": 0},
    }
    convert(novels_8m, recipe, out, quiet=True)
    return out


@pytest.mark.parametrize("ranks", [1, 2])
def test_served_as_transformers_computes(
    engine: Engine, model: Path, novel_tokens: list[list[int]], ranks: int
) -> None:
    check_served(engine, model, novel_tokens[:2], 1e-3, ranks=ranks, kernel="cpu_exact")


def test_pipeline_stages_are_refused(
    engine: Engine, model: Path, novel_tokens: list[list[int]]
) -> None:
    result = engine.run(
        model, novel_tokens[:1], dtype="float32", pipeline_parallel_size=2, env=EXACT
    )
    assert result.error
    said = "shared by layers of several pipeline ranks, which cannot share weights"
    assert said in engine.log
