"""Mixtures of experts: int4-rtn of a Mixtral of 3 GB, and int4-gptq of one block of it.

A block of eight experts is 161 million weights, 0.30 GiB in bf16, 0.60 as float32, which it is
computed in. Memory of int4-gptq does not depend on how many blocks there are; time does.
"""

from __future__ import annotations

from typing import Any

from tests.benchmarks.conversion.memory import Case, gptq, measure, table

__all__ = ["run", "table"]

SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 3072,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
BLOCKS, SAMPLES, VOCABULARY = 10, 4, 4096


def run() -> dict[str, Any]:
    many, one = ({**SHAPE, "num_hidden_layers": count} for count in (BLOCKS, 1))
    name = "1 block of it, int4-gptq (4 + 2 sequences)"
    cases = [
        Case("Mixtral of 8 experts, int4-rtn", many, "int4-rtn", shards=4, vocabulary=VOCABULARY),
        Case(name, one, gptq(SAMPLES), vocabulary=VOCABULARY, text=True),
    ]
    return measure(cases)
