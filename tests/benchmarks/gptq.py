"""int4-gptq of 1 billion parameters, calibrated on text it writes itself: peak memory and MB/s.

34 + 2 sequences instead of the recipe's 64 + 8: one batch of the two it would write, so keys and
values take as much memory as they ever do; activations would take 0.15 GiB more. Time doubles.
"""

from __future__ import annotations

from typing import Any

from tests.benchmarks.memory import ONE_B, Case, gptq, measure, table

__all__ = ["run", "table"]


def run() -> dict[str, Any]:
    return measure([Case("1B, int4-gptq (34 + 2 own sequences)", ONE_B, gptq(34), shards=2)])
