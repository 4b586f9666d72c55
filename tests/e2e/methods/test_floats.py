"""Floats of few bits are served, by one rank and by two, as transformers computes with the values
they hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.e2e.support.engine import Engine
from tests.e2e.support.served import check_served
from tests.e2e.support.tiny import compress

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

FORMATS: dict[str, dict[str, Any]] = {
    "row": {"format": "float"},
    "group": {"format": "float", "group_size": 32},
    "mx8": {"format": "float", "kind": "mxfp8"},
    "mx4": {"format": "float", "kind": "mxfp4"},
    "nv4": {"format": "float", "kind": "nvfp4"},
    "turned": {"format": "rotated", "base": {"format": "float", "kind": "nvfp4"}, "block": 64},
    "active": {"format": "float", "activations": "fp8"},
}
INT8_ACTIVATIONS = 0.02
"""Nats that those may cost on the whole."""
BLOCKS = {"format": "float", "group_size": 128, "group_rows": 128}


@pytest.fixture(scope="module")
def model(novels_8m: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind in some block, embedding and head; blocks of 128 rows in one MLP, as k has 64 on
    each of two ranks."""
    kinds = {rf"re:model\.layers\.{i}\..*": name for i, name in enumerate(FORMATS)}
    return compress(
        novels_8m,
        tmp_path_factory.mktemp("floats") / "out",
        {**FORMATS, "wide": BLOCKS},
        {
            **kinds,
            r"re:.*\.7\.mlp\..*": "wide",
            **{"blocks": "mx4", "embedding": "nv4", "lm_head": "row"},
        },
    )


@pytest.mark.parametrize(("ranks", "kernel"), [(1, "cpu_exact"), (1, "cpu"), (2, "cpu_exact")])
def test_served_as_transformers_computes(
    engine: Engine,
    model: Path,
    novel_tokens: list[list[int]],
    ranks: int,
    kernel: str,
) -> None:
    """Two ranks find scales of activations for halves of a token where they divide columns."""
    bound = 2e-3 if (ranks, kernel) == (1, "cpu_exact") else INT8_ACTIVATIONS
    check_served(engine, model, novel_tokens[:2], bound, ranks=ranks, kernel=kernel)
