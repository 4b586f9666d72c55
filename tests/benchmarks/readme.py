"""Puts the tables of the results that are kept into README.md, between `<!-- NAME -->` and
`<!-- /NAME -->`: `python -m tests.benchmarks.readme`."""

from __future__ import annotations

import json
import re
from importlib import import_module
from pathlib import Path
from typing import Any

from tests.benchmarks.memory import REPOSITORY

RESULTS = Path(__file__).parent / "results"
README = REPOSITORY / "README.md"
BLOCK = re.compile(r"(<!-- (\w+) -->\n).*?(<!-- /\2 -->)", re.DOTALL)
SEVERAL = {"memory": ("rtn", "gptq", "layers")}
"""Benchmarks whose rows are one table."""


def results_of(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def table_of(name: str) -> str:
    """A benchmark's `summary` of its results, or its table where it has none."""
    module = import_module(f"tests.benchmarks.{name}")
    if name in SEVERAL:
        results = {"rows": [row for part in SEVERAL[name] for row in results_of(part)["rows"]]}
    else:
        results = results_of(name)
    text: str = getattr(module, "summary", module.table)(results)
    return text


def filled(text: str) -> str:
    """`text` with every block's table as its results say."""
    return BLOCK.sub(lambda found: f"{found[1]}{table_of(found[2])}\n{found[3]}", text)


if __name__ == "__main__":
    README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")
