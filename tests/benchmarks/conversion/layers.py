"""Time of conversions of 4, 8 and 16 layers: it grows with the layers, memory does not."""

from __future__ import annotations

from typing import Any

from tests.benchmarks.conversion.memory import SMALL, Case, gptq, measure, table

__all__ = ["run", "table"]


def run() -> dict[str, Any]:
    cases = []
    for recipe, name in (("int4-rtn", "int4-rtn"), (gptq(8), "int4-gptq (8 + 2 sequences)")):
        for count in (4, 8, 16):
            shape = {**SMALL, "num_hidden_layers": count}
            text = not isinstance(recipe, str)
            cases.append(Case(f"{count} layers, {name}", shape, recipe, vocabulary=4096, text=text))
    return measure(cases)
