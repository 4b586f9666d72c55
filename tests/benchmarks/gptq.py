"""int4-gptq of 1 billion parameters, calibrated on text it writes itself: peak memory and MB/s.

14 + 2 sequences instead of the recipe's 64 + 8, which would take two hours on two cores. Memory:
two batches of 36 sequences would hold 0.6 GiB more keys and values while writing, and their
activations take 0.25 GiB more while converting.
"""

from __future__ import annotations

from typing import Any

from tests.benchmarks.memory import ONE_B, Case, gptq, measure, table

__all__ = ["run", "table"]


def run() -> dict[str, Any]:
    return measure([Case("1B, int4-gptq (14 + 2 own sequences)", ONE_B, gptq(14), shards=2)])
