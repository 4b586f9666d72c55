"""int4-gptq of 1 billion parameters: peak memory and MB/s.

Calibrated on 4 + 2 sequences of a text instead of 64 + 8. Memory hardly depends on it (the
activations of the others would add 0.3 GiB), time does: the forward passes take twelve times as
long with all.
"""

from __future__ import annotations

from typing import Any

from tests.benchmarks.conversion.memory import ONE_B, Case, gptq, measure, table

__all__ = ["run", "table"]


def run() -> dict[str, Any]:
    case = Case("1B, int4-gptq (4 + 2 sequences)", ONE_B, gptq(4), shards=2, text=True)
    return measure([case])
