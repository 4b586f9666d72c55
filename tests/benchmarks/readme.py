"""Puts the kept results into the documents: `python -m tests.benchmarks.readme`.

In each of `DOCUMENTS` the text between `<!-- NAME -->` and `<!-- /NAME -->` becomes the table of
that name: a benchmark's, or one of `VIEWS`, which are short. The README's picture is drawn anew.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from tests.benchmarks import flow, summaries
from tests.benchmarks.conversion.memory import REPOSITORY

RESULTS = Path(__file__).parent / "results"
README = REPOSITORY / "README.md"
DOCUMENTS = (README, RESULTS / "README.md")
PICTURE = RESULTS.parent / "flow.svg"
BLOCK = re.compile(r"(<!-- (\w+) -->\n).*?(<!-- /\2 -->)", re.DOTALL)
ROOMS = {
    "quality": "loss",
    "parts": "loss",
    "mixture": "loss",
    "bits": "loss",
    "losses": "loss",
    "task": "loss",
    "peers": "loss",
    "rtn": "conversion",
    "gptq": "conversion",
    "layers": "conversion",
    "experts": "conversion",
    "refine": "conversion",
    "memory": "conversion",
    "activations": "loss",
    "kernels": "speed",
    "serving": "speed",
    "profile": "speed",
    "planner": "speed",
    "gpu": "speed",
}
"""Folder of each benchmark's module."""
WHEN_NAMED = ("peers", "gpu")
"""Benchmarks that not every machine can run: they install other tools, or need a GPU."""
SEVERAL = {"memory": ("rtn", "gptq", "layers", "experts")}
"""Benchmarks whose rows are one table."""
VIEWS: dict[str, Callable[[], str]] = {
    "methods": lambda: summaries.methods(results_of("quality")),
    "speed": lambda: summaries.speed(results_of("serving")),
    "plan": summaries.planned,
}


def module_of(name: str) -> Any:
    return import_module(f"tests.benchmarks.{ROOMS[name]}.{name}")


def results_of(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def table_of(name: str) -> str:
    """A view, a benchmark's `summary` of its results, or its table where it has none."""
    if name in VIEWS:
        return VIEWS[name]()
    module = module_of(name)
    if name in SEVERAL:
        results = {"rows": [row for part in SEVERAL[name] for row in results_of(part)["rows"]]}
    else:
        results = results_of(name)
    text: str = getattr(module, "summary", module.table)(results)
    return text


def filled(text: str) -> str:
    """`text` with every block's table as its results say."""
    return BLOCK.sub(lambda found: f"{found[1]}{table_of(found[2])}\n{found[3]}", text)


def picture() -> str:
    return flow.picture(results_of("serving"))


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
    for document in DOCUMENTS:
        document.write_text(filled(document.read_text(encoding="utf-8")), encoding="utf-8")
