"""The gate of a recipe: how much a result may lose, and what to try where it loses more.

    accept:
      kl: 0.01                      # nats per token of held-out text, at most
      perplexity_increase: 1%       # at most
      top1: 98%                     # share of tokens whose likeliest is the original's, at least
      task: {file: questions.jsonl, drop: 1%}   # accuracy, at most so many points lower
    fallback: [int4-gptq, int8]     # recipe names, files or mappings, tried in this order

Any of the keys will do. Files are relative to the recipe's own. Fallbacks take this recipe's
`calibration`, so that all are measured on the same text; `search/gate.py` carries it out.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress_methods.errors import RecipeError

ACCEPT, FALLBACK = "accept", "fallback"
GATE_KEYS = (ACCEPT, FALLBACK)
LEAST_SEQUENCES = 20
HELD_OUT = 32
"""Sequences held out where a recipe has a gate and does not say how many."""
MOST_FALLBACKS = 16
TASK_SUFFIXES = (".jsonl", ".yaml", ".yml")


@dataclass(frozen=True)
class TaskBound:
    """Questions in `file`, and how far the share answered rightly may `drop`."""

    file: str
    drop: float

    def __post_init__(self) -> None:
        if not 0 < self.drop < 1:
            raise RecipeError(f"drop is {self.drop}, expected a share between 0 and 1")
        if Path(self.file).suffix not in TASK_SUFFIXES:
            raise RecipeError(f"file is {self.file!r}, expected {' or '.join(TASK_SUFFIXES)}")


@dataclass(frozen=True)
class Accept:
    """What a result may lose; a bound that is None is not asked for."""

    kl: float | None = None
    perplexity_increase: float | None = None
    top1: float | None = None
    task: TaskBound | None = None

    def __post_init__(self) -> None:
        if all(value is None for value in vars(self).values()):
            raise RecipeError("expected kl, perplexity_increase, top1, task or several of them")
        for name in ("kl", "perplexity_increase"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise RecipeError(f"{name} is {value}, expected a number more than 0")
        if self.top1 is not None and not 0 < self.top1 < 1:
            raise RecipeError(f"top1 is {self.top1}, expected a share between 0 and 1")

    @property
    def reads_text(self) -> bool:
        """Whether a bound is on held-out text."""
        return any(v is not None for v in (self.kl, self.perplexity_increase, self.top1))

    def to_dict(self) -> dict[str, Any]:
        """The bounds that are asked for; of a file its name, not where it lies."""
        found = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        if self.task is not None:
            found["task"] = {"file": Path(self.task.file).name, "drop": self.task.drop}
        return found
