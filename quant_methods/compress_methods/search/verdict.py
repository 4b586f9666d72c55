"""What a gate says of a result: every bound held against what was measured and its 95% interval.

    within      the interval's bad end is on the good side of the bound
    beyond      the whole interval is on the bad side, or the value is not finite
    undecided   the bound is inside the interval, or there are fewer than `LEAST_SEQUENCES`
                observations: too few to tell

Only a result all of whose bounds are `within` is accepted. One that is exactly at a bound is
accepted in 2.5% of tries. How many observations would tell follows from the interval, which shrinks
with their square root: as many as show a value equal to the one seen in four of five cases.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

from compress_methods.errors import CheckpointError
from compress_methods.evaluation.heatmap import ERRORS, find_errors
from compress_methods.evaluation.metrics import CONFIDENCE
from compress_methods.evaluation.tasks import TaskResult
from compress_methods.recipe.accept import LEAST_SEQUENCES, Accept

WITHIN, BEYOND, UNDECIDED = "within", "beyond", "undecided"
POWER = 0.8
MOST_LAYERS = 3
HELD = (
    ("kl", "kl", ".4g", "above"),
    ("perplexity_increase", "perplexity_increase", "+.2%", "above"),
    ("top1", "top1_agreement", ".2%", "below"),
)
"""Key in `accept`, key in a report's `held_out`, style, and the bad side."""


@dataclass(frozen=True)
class Verdict:
    """One bound: the value measured, its interval, the limit, and `n` observations of a `unit`;
    `side` of the limit is the bad one. An end that is None is not known."""

    bound: str
    value: float | None
    low: float | None
    high: float | None
    limit: float
    side: str
    n: int
    unit: str
    style: str

    @property
    def state(self) -> str:
        """`within`, `beyond` or `undecided`."""
        if self.value is None:
            return BEYOND
        if self.n < LEAST_SEQUENCES or self.low is None or self.high is None:
            return UNDECIDED
        bad, good = (self.high, self.low) if self.side == "above" else (self.low, self.high)
        if self._over(good) > 0:
            return BEYOND
        return UNDECIDED if self._over(bad) > 0 else WITHIN

    def _over(self, value: float) -> float:
        """How far on the bad side of the limit."""
        return value - self.limit if self.side == "above" else self.limit - value

    @property
    def needed(self) -> int | None:
        """About how many observations would tell; None where no number can be said to."""
        bad = self.high if self.side == "above" else self.low
        if self.value is None or bad is None or self._over(self.value) >= 0:
            return None
        normal = NormalDist()
        z, power = normal.inv_cdf((1 + CONFIDENCE) / 2), normal.inv_cdf(POWER)
        half = abs(bad - self.value) * (z + power) / z
        return max(LEAST_SEQUENCES, math.ceil(self.n * (half / self._over(self.value)) ** 2))

    def line(self) -> str:
        """In words, with the number that decided."""
        if self.value is None:
            return f"{self.bound} is not finite"
        found = f"{self.bound} {self.value:{self.style}}"
        if self.low is not None and self.high is not None:
            found += f" ({self.low:{self.style}} to {self.high:{self.style}})"
        limit = format(self.limit, self.style)
        if self.state == WITHIN:
            return f"{found} is within {limit}"
        if self.state == BEYOND:
            return f"{found} is beyond {limit}"
        told = "" if self.needed is None else f", about {self.needed:,} may do"
        return f"{found} against {limit}: {self.n} {self.unit} are too few to tell{told}"

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        found = {key: value for key, value in asdict(self).items() if key != "style"}
        return {**found, "state": self.state}


def judge(
    accept: Accept, held: Mapping[str, Any] | None, tasks: Sequence[TaskResult]
) -> list[Verdict]:
    """Every bound of `accept` against a report's `held_out` and the results of its task."""
    verdicts = []
    for bound, key, style, side in HELD:
        limit = getattr(accept, bound)
        if limit is not None:
            assert held is not None
            low, high = (held["intervals"] or {}).get(key, (None, None))
            n = held["sequences"]
            found = (held[key], low, high, limit, side, n, "held-out sequences", style)
            verdicts.append(Verdict(bound, *found))
    if accept.task is not None:
        result = tasks[0]
        change, name = result.change, f"{result.metric} of {result.task}"
        ends = (change.value, change.low, change.high)
        limit = -accept.task.drop
        verdicts.append(Verdict(name, *ends, limit, "below", change.n, "questions", "+.2%"))
    return verdicts


def costliest(modules: Mapping[str, Mapping[str, Any]]) -> str:
    """The layers whose matrices have the largest errors, in words; empty where none has one."""
    try:
        measure, cells = find_errors(modules)
    except CheckpointError:
        return ""
    layers: dict[int, list[float]] = defaultdict(list)
    for (layer, _), error in cells.items():
        layers[layer].append(error)
    means = {layer: sum(errors) / len(errors) for layer, errors in layers.items()}
    most = sorted(means, key=lambda layer: -means[layer])[:MOST_LAYERS]
    worst = max(cells, key=lambda cell: cells[cell])
    shown = ", ".join(f"{layer} ({means[layer]:.2g})" for layer in most)
    return (
        f"largest {ERRORS[measure]} in layers {shown}, "
        f"and in {worst[1]} of layer {worst[0]} ({cells[worst]:.2g})"
    )
