"""int4-rtn of 3 billion parameters in four shards: peak memory and MB/s."""

from __future__ import annotations

from typing import Any

from tests.benchmarks.conversion.memory import THREE_B, Case, measure, table

__all__ = ["run", "table"]


def run() -> dict[str, Any]:
    return measure([Case("3B, int4-rtn", THREE_B, "int4-rtn", shards=4)])
