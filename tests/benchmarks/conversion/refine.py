"""`refine` on one block of a Llama of 1.2 billion parameters: seconds and peak memory.

Beside it the same conversion with the start alone, so that an iteration's seconds are the
difference. A block is 61 million weights, 0.23 GiB as float32.
"""

from __future__ import annotations

from typing import Any

from tests.benchmarks.conversion.memory import ONE_B, Case, gptq, measure, table

__all__ = ["run", "table"]

ITERATIONS = 10
SAMPLES = 4
VOCABULARY = 4096


def run() -> dict[str, Any]:
    shape = {**ONE_B, "num_hidden_layers": 1}
    start = gptq(SAMPLES)
    rule = start["modules"][0]
    algorithm = {"algorithm": "refine", "start": rule["algorithm"], "iterations": ITERATIONS}
    refined = {**start, "modules": [{**rule, "algorithm": {**algorithm, "batch": 1}}]}
    cases = [
        Case("1 block of 1.2B, int4-gptq", shape, start, vocabulary=VOCABULARY, text=True),
        Case(
            f"1 block of 1.2B, int4, refine ({ITERATIONS} iterations of 1 sequence)",
            shape,
            refined,
            vocabulary=VOCABULARY,
            text=True,
        ),
    ]
    return measure(cases)
