"""Is B as good as A? Non-inferiority, metric by metric.

A margin says how much worse B may be. B is `non-inferior` where the whole confidence interval is
on the good side of it, `inferior` where the whole of it is on the bad side, `undecided` otherwise.
With a two-sided 95% interval, a B that is exactly at the margin is called non-inferior in 2.5% of
comparisons. The overall verdict is non-inferior only where every judged metric is, which keeps
that error without correction (an intersection-union test: Berger, 1982).

The confidence is that of one look: `comparison` divides what the user allows among all of them.

How many prompts an undecided metric needs follows from what was seen: the smallest number at which
the interval would keep clear of the margin with a power of 80%. The value seen is itself unsure, as
the pairs seen are few, so it is taken to be as bad as it is in one of five cases, up to three times
the number that would do if it were the true one.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import NormalDist

from compress_methods.evaluation.statistics import Estimate

NON_INFERIOR, INFERIOR, UNDECIDED = "non-inferior", "inferior", "undecided"
LEAST_PAIRS = 20
MOST_PAIRS = 10_000_000
POWER = 0.8
MOST_CAUTION = 3
LARGEST_EXPONENT = 700.0


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
    verdict = UNDECIDED if estimate is None else decide(estimate, limit)
    if estimate is None or verdict != UNDECIDED:
        return Judgement(verdict)
    return Judgement(UNDECIDED, needed_pairs(estimate, limit, confidence))


def decide(estimate: Estimate, limit: Limit) -> str:
    """The verdict on one metric."""
    low, high = limit.bounds()
    if estimate.n >= LEAST_PAIRS:
        if low <= estimate.low and estimate.high <= high:
            return NON_INFERIOR
        if estimate.low > high or estimate.high < low:
            return INFERIOR
    return UNDECIDED


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
    """Count the pairs with which the value would be told from the limit at `POWER`; None where no
    number is enough, as for a limit between the two bounds of a value."""
    good = _keeps(estimate, limit)
    if good is None:
        return None
    plain = _fewest(estimate, limit, confidence, good)
    if plain is None:
        return None
    careful = [plain]
    for value in estimate.interval(estimate.n, 2 * POWER - 1):
        if math.isfinite(value) and (value > 0 or not estimate.log):
            assumed = estimate.assuming(value)
            more = (
                _fewest(assumed, limit, confidence, good)
                if _keeps(assumed, limit) is good
                else None
            )
            careful.append(MOST_PAIRS if more is None else more)
        else:
            careful.append(MOST_PAIRS)
    return max(min(max(careful), MOST_CAUTION * plain), estimate.n + 1)


def _keeps(estimate: Estimate, limit: Limit) -> bool | None:
    """Whether the value lies on the good side of the limit; None for bounds on either side."""
    low, high = limit.bounds()
    most = estimate.value if estimate.most is None else estimate.most
    if low <= estimate.value and most <= high:
        return True
    return None if low <= estimate.value <= high else False


def _fewest(estimate: Estimate, limit: Limit, confidence: float, good: bool) -> int | None:
    """The smallest number of pairs whose interval would keep clear of the limit, if chance moved it
    there; None where not even the largest is enough."""
    low, high = limit.bounds()
    power = NormalDist().inv_cdf(POWER)

    def clear(pairs: int) -> bool:
        by = power * estimate.standard_error(pairs)
        ends = estimate.interval(pairs, confidence)
        under, over = (
            _moved(end, by * way, estimate.log) for way, end in zip((-1, 1), ends, strict=True)
        )
        return low <= under and over <= high if good else under > high or over < low

    if not clear(MOST_PAIRS):
        return None
    return bisect_left(range(MOST_PAIRS), True, lo=LEAST_PAIRS, key=clear)


def _moved(end: float, by: float, log: bool) -> float:
    """An end moved on the scale of its errors."""
    if not log:
        return end + by
    return end * math.exp(min(by, LARGEST_EXPONENT)) if end > 0 else end
