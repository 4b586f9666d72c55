"""Tables and trellises are served, by one rank and by two, as transformers computes with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.e2e.support.engine import Engine
from tests.e2e.support.served import check_served
from tests.e2e.support.tiny import compress

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

FORMATS: dict[str, dict[str, Any]] = {
    "three": {"format": "lookup", "bits": 3},
    "two": {"format": "lookup", "bits": 2, "group_size": 64, "table": "binary"},
    "rows": {"format": "lookup", "bits": 4, "group_size": 64, "table_rows": 1},
    "wide": {"format": "lookup", "bits": 4, "table_rows": 64},
    "nf4": {"format": "lookup", "table": "nf4"},
    "fp4": {"format": "lookup", "group_size": 32, "table": "fp4"},
    "turned": {"format": "rotated", "base": {"format": "lookup", "bits": 3}, "block": 64},
    "trellis": {"format": "rotated", "base": {"format": "trellis", "state_bits": 8}, "block": 64},
}
INT8_ACTIVATIONS = 0.02
"""Nats that those may cost on the whole."""


@pytest.fixture(scope="module")
def model(novels_8m: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind of table, and a trellis, in some block, embedding and head; q, k and v apart where
    64 rows share one, as k has fewer on each of two ranks."""
    blocks = {rf"re:model\.layers\.{i}\..*": name for i, name in enumerate(FORMATS)}
    return compress(
        novels_8m,
        tmp_path_factory.mktemp("coded") / "out",
        FORMATS,
        {**blocks, "embedding": "nf4", "lm_head": "rows"},
    )


@pytest.mark.parametrize(("ranks", "kernel"), [(1, "cpu_exact"), (1, "cpu"), (2, "cpu_exact")])
def test_served_as_transformers_computes(
    engine: Engine,
    model: Path,
    novel_tokens: list[list[int]],
    ranks: int,
    kernel: str,
) -> None:
    bound = 1e-3 if kernel == "cpu_exact" else INT8_ACTIVATIONS
    check_served(engine, model, novel_tokens[:2], bound, ranks=ranks, kernel=kernel)
