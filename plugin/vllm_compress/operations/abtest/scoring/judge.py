"""Is B as good as A? Non-inferiority, metric by metric.

A margin says how much worse B may be. B is `non-inferior` where the whole confidence interval is
on the good side of it, `inferior` where the whole of it is on the bad side, `undecided` otherwise.
With a two-sided 95% interval, a B that is exactly at the margin is called non-inferior in 2.5% of
comparisons. The overall verdict is non-inferior only where every judged metric is, which keeps
that error without correction (an intersection-union test: Berger, 1982).

The confidence is that of one look: `comparison` divides what the user allows among all of them.

How many prompts an undecided metric needs follows from the spread seen: the smallest number at
which a true value equal to the one seen would be told from the margin with a power of 80%.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, replace
from statistics import NormalDist

from compress_methods.evaluation.statistics import Estimate

NON_INFERIOR, INFERIOR, UNDECIDED = "non-inferior", "inferior", "undecided"
LEAST_PAIRS = 20
MOST_PAIRS = 10_000_000
POWER = 0.8


@dataclass(frozen=True)
class Limit:
    """The worst value that still is as good: `value` is on the scale of the estimate. `side` is
    the bad one: "above", "below", or "both" for a ratio that may leave 1 in neither direction."""

    value: float
    side: str

    def bounds(self) -> tuple[float, float]:
        """Lowest and highest good value."""
        if self.side == "both":
            return 1 / self.value, self.value
        return (self.value, math.inf) if self.side == "below" else (-math.inf, self.value)


@dataclass(frozen=True)
class Judgement:
    """A verdict, and the pairs needed for one where it is undecided; None: more than can be said,
    because the value lies at its margin or nothing was measured."""

    verdict: str
    needed: int | None = None


def judge(estimate: Estimate | None, limit: Limit, confidence: float) -> Judgement:
    """Judge one metric; an estimate that is None could not be made."""
    if estimate is None:
        return Judgement(UNDECIDED)
    low, high = limit.bounds()
    if estimate.n >= LEAST_PAIRS:
        if low <= estimate.low and estimate.high <= high:
            return Judgement(NON_INFERIOR)
        if estimate.low > high or estimate.high < low:
            return Judgement(INFERIOR)
    return Judgement(UNDECIDED, needed_pairs(estimate, limit, confidence))


def overall(judgements: Iterable[Judgement]) -> Judgement:
    """Judge all metrics together, as the worst of them."""
    every = list(judgements)
    verdicts = {one.verdict for one in every}
    if INFERIOR in verdicts:
        return Judgement(INFERIOR)
    if verdicts == {NON_INFERIOR}:
        return Judgement(NON_INFERIOR)
    needs = [one.needed for one in every if one.verdict == UNDECIDED]
    known = [need for need in needs if need is not None]
    return Judgement(UNDECIDED, max(known) if needs and len(known) == len(needs) else None)


def needed_pairs(estimate: Estimate, limit: Limit, confidence: float) -> int | None:
    """Count the pairs with which `estimate.value` would be told from the limit at `POWER`; None
    where no number is enough, as for a limit between the two bounds of a value."""
    if estimate.most is not None:
        low, high = limit.bounds()
        if low <= estimate.value <= high < estimate.most:
            return None
        value = estimate.most if estimate.most <= high else estimate.value
        return needed_pairs(replace(estimate, value=value, most=None), limit, confidence)
    distance = _distance(estimate, limit)
    if not distance > 0 or not math.isfinite(distance):
        return None
    normal = NormalDist()
    errors = normal.inv_cdf((1 + confidence) / 2) + normal.inv_cdf(POWER)
    if estimate.proportional and 0 < estimate.value < limit.value:
        errors *= limit.value / estimate.value

    def enough(pairs: int) -> bool:
        return errors * estimate.standard_error(pairs) <= distance

    if not enough(MOST_PAIRS):
        return None
    fewest = bisect_left(range(MOST_PAIRS), True, lo=LEAST_PAIRS, key=enough)
    return max(fewest, estimate.n + 1)


def _distance(estimate: Estimate, limit: Limit) -> float:
    """Measure from the value to the nearer end of what is good, on the scale of the errors."""
    scale = _log if estimate.log else float
    ends = [end for end in limit.bounds() if math.isfinite(end)]
    return min(abs(scale(estimate.value) - scale(end)) for end in ends)


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf
