"""Matrices whose columns no group divides, served: what transformers computes with them."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from compress_methods import convert
from tests.e2e.support.engine import Engine
from tests.e2e.support.served import check_served
from tests.e2e.support.tiny import INT4, SMALL, VOCABULARY, make_model

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def test_columns_of_a_width_that_no_group_divides(engine: Engine, tmp_path: Path) -> None:
    odd = {**SMALL, "hidden_size": 176, "intermediate_size": 208, "tie_word_embeddings": True}
    model = make_model("Llama", tmp_path / "odd", **odd)
    recipe = {
        "formats": {"w4": INT4},
        "modules": [{"match": ["blocks", "embedding"], "format": "w4"}],
        "on_unfit": "pad",
        "calibration": {"held_out": 0},
    }
    report = convert(model, recipe, tmp_path / "out", quiet=True)
    padded = [name for name, m in report["modules"].items() if "padded" in m["format"]]
    assert len(padded) == 2 * 6 + 1
    draw = random.Random(0)
    prompts = [[draw.randrange(2, VOCABULARY - 20) for _ in range(40)] for _ in range(2)]
    check_served(engine, tmp_path / "out", prompts, 2e-5, kernel="reference")
    check_served(engine, tmp_path / "out", prompts, 1e-3, kernel="cpu_exact")
