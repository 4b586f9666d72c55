"""Estimates with confidence intervals from pairs: one observation of A and of B per prompt,
or of an original and its compressed form per held-out sequence.

The prompt (the sequence) is the unit that was drawn at random, so every interval is over prompts,
tokens of one prompt counting as one cluster. One estimator per kind of number:

    ratio of totals                  ratio estimator, linearised variance (Cochran, Sampling
                                     Techniques, ch. 6), Student's t; ratios on the log scale
    mean per token of what is skewed the same with the wider of two upper ends, see `skewed`: KL has
                                     a long right tail, and its upper end decides
    mean of paired log ratios        Student's t on the logs: a geometric mean
    difference of values in [0, 1]   the wider of two: adjusted Wald of Bonett and Price (2012),
                                     one more pair of each extreme added; and a score interval in
                                     the manner of Tango (1998) for any bounded pair: its ends are
                                     means whose own variance, as much of the sample as it takes
                                     being pairs of that extreme, just allows what was seen
    mean of values in [0, 1]         Clopper and Pearson's, with the size that the variance between
                                     prompts says, at most the tokens, less what that variance is
                                     itself unsure (Korn and Graubard, Survey Methodology 24, 1998)
    ratio of quantiles               percentile bootstrap over blocks of neighbouring prompts
    median of all tokens             Woodruff's interval (J. Am. Stat. Assoc. 47, 1952): where
                                     the share of tokens below, and its error, put the ends

Latencies of neighbouring requests are not independent (queues, a disturbed machine), see `serial`.

`Estimate.interval` foretells: the ends that so many pairs like those seen would give.

Fails where: fewer than some twenty prompts (the normal approximation); quantiles with less than
five observations beyond them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

# Not scipy.stats, which takes a second to import and asks the same function.
from scipy.special import betaincinv, stdtrit  # type: ignore[import-untyped]

from compress_methods.evaluation.serial import memory_square, one_less, wave_square, waves
from compress_methods.evaluation.skewed import Array as Array
from compress_methods.evaluation.skewed import fit_log_normal, unskewed

RESAMPLES = 2000
CHUNK = 2**22
Ends = tuple[float, float]


@dataclass(frozen=True)
class Estimate:
    """A value, its interval, the number of pairs behind it. `log` tells that it is a ratio, whose
    error is measured on logs; `standard_error(m)` is what m pairs like these would give there, and
    `interval(m, confidence)` the ends they would give. `assuming(value)` is the estimate had this
    been the value seen, its spread such as goes with it. Where only bounds of the value are known,
    `value` is the lower and `most` the upper one, and the interval holds both."""

    value: float
    low: float
    high: float
    n: int
    standard_error: Callable[[float], float] = field(repr=False, compare=False)
    interval: Callable[[float, float], Ends] = field(repr=False, compare=False)
    assuming: Callable[[float], Estimate] = field(repr=False, compare=False)
    log: bool = False
    most: float | None = None


def make_estimate(
    value: float,
    n: int,
    confidence: float,
    standard_error: Callable[[float], float],
    interval: Callable[[float, float], Ends],
    assuming: Callable[[float], Estimate],
    log: bool = False,
) -> Estimate:
    """An estimate whose ends are those of `interval` at the pairs that there are."""
    return Estimate(value, *interval(n, confidence), n, standard_error, interval, assuming, log)


def t_quantile(p: float, df: float) -> float:
    """Quantile of Student's t."""
    return float(stdtrit(df, p))


def mean_log_ratio(a: ArrayLike, b: ArrayLike, confidence: float, serial: bool) -> Estimate:
    """Geometric mean of b / a, both positive, in the order of time where they are `serial`."""
    logs = np.log(_floats(b)) - np.log(_floats(a))
    return _student(float(logs.mean()), (logs - logs.mean()) / len(logs), confidence, serial, True)


def mean_of(values: ArrayLike, confidence: float) -> Estimate:
    """The plain mean of what is neither bounded nor skewed."""
    x = _floats(values)
    return _student(float(x.mean()), (x - x.mean()) / len(x), confidence)


def mean_per(total: ArrayLike, count: ArrayLike, confidence: float) -> Estimate:
    """sum(total) / sum(count), such as nats per token from those of every prompt; skewed."""
    y, x = _floats(total), _floats(count)
    mean, n = float(y.sum() / x.sum()), len(y)
    influence = (y - mean * x) / x.sum()
    if n == 1:
        return _unknown(mean, n)
    square = float((influence**2).mean())
    spread = n * math.sqrt(square * n / (n - 1))
    skew = float((influence**3).mean()) / square**1.5 if square else 0.0
    fitted = fit_log_normal(y / x, x) if square and np.isfinite(y).all() else None

    def interval(pairs: float, confidence: float) -> Ends:
        p = (1 + confidence) / 2
        t, error = t_quantile(p, pairs - 1), spread / math.sqrt(pairs)
        low, high = (mean - error * unskewed(u, skew / math.sqrt(pairs)) for u in (t, -t))
        return low, max(high, fitted.upper(p, pairs / n)) if fitted else high

    def assuming(value: float) -> Estimate:
        return mean_per(y * value / mean if mean > 0 else y, x, confidence)

    def standard_error(pairs: float) -> float:
        return spread / math.sqrt(pairs)

    return make_estimate(mean, n, confidence, standard_error, interval, assuming)


def mean_between(
    least: ArrayLike, most: ArrayLike, count: ArrayLike, confidence: float
) -> Estimate:
    """`mean_per` of a total of which two bounds are known: from the lower end of the one to the
    upper end of the other."""
    below = mean_per(least, count, confidence)
    finite = np.isfinite(_floats(most)).all()
    above = mean_per(most, count, confidence) if finite else _unknown(math.inf, below.n)

    def interval(pairs: float, confidence: float) -> Ends:
        return below.interval(pairs, confidence)[0], above.interval(pairs, confidence)[1]

    def assuming(value: float) -> Estimate:
        known = above.value if value > above.value else below.value
        times = value / known if known > 0 else 1.0
        return mean_between(_floats(least) * times, _floats(most) * times, count, confidence)

    return replace(
        above if finite else below,
        value=below.value,
        low=below.low,
        high=above.high,
        most=above.value,
        interval=interval,
        assuming=assuming,
    )


def exp_mean_per(total: ArrayLike, count: ArrayLike, confidence: float) -> Estimate:
    """exp(sum(total) / sum(count)): a ratio of perplexities from differences in nats."""
    y, x = _floats(total), _floats(count)
    mean = y.sum() / x.sum()
    return _student(float(mean), (y - mean * x) / x.sum(), confidence, log=True)


def ratio_of_rates(
    a: tuple[ArrayLike, ArrayLike],
    b: tuple[ArrayLike, ArrayLike],
    confidence: float,
    serial: bool = False,
) -> Estimate:
    """(sum b0 / sum b1) / (sum a0 / sum a1), such as tokens per second of B over those of A."""
    shares = [_floats(part) / _floats(part).sum() for part in (*a, *b)]
    log_ratio = sum(
        sign * math.log(_floats(part).sum())
        for sign, part in zip((-1, 1, 1, -1), (*a, *b), strict=True)
    )
    influence = shares[2] - shares[3] - shares[0] + shares[1]
    return _student(log_ratio, influence, confidence, serial, True)


def bounded_difference(a: ArrayLike, b: ArrayLike, confidence: float) -> Estimate:
    """Mean of b - a for values in [0, 1]."""
    d = _floats(b) - _floats(a)
    return _difference(len(d), float(d.mean()), float((d**2).mean()), confidence)


def _difference(n: int, first: float, second: float, confidence: float) -> Estimate:
    """Interval of the mean of values in [-1, 1] from their mean and mean square."""

    def standard_error(pairs: float) -> float:
        mean, square = first * pairs / (pairs + 2), (second * pairs + 2) / (pairs + 2)
        return math.sqrt(max(0.0, square - mean**2) / (pairs + 2))

    def interval(pairs: float, confidence: float) -> Ends:
        z = _z(confidence)
        centre, half = first * pairs / (pairs + 2), z * standard_error(pairs)
        low = min(centre - half, first - _score_reach(first, second, pairs, z))
        high = max(centre + half, first + _score_reach(-first, second, pairs, z))
        return max(-1.0, low), min(1.0, high)

    def assuming(value: float) -> Estimate:
        """Pairs that moved did so by the whole range."""
        return _difference(n, value, min(1.0, second + abs(value - first)), confidence)

    return make_estimate(first, n, confidence, standard_error, interval, assuming)


def _score_reach(mean: float, square: float, pairs: float, z: float) -> float:
    """How far below the mean of values in [-1, 1] with this mean square a true mean may lie.

    A share w of the sample turned to -1 has the mean (1 - w) mean - w; its variance is that of the
    true mean so far below. The distance u solves pairs u^2 = z^2 variance(u), which is quadratic.
    """
    if mean <= -1:
        return 0.0
    lead = pairs + z**2
    slope = z**2 * ((1 - square) / (1 + mean) + 2 * mean)
    rest = z**2 * max(0.0, square - mean**2)
    return (slope + math.sqrt(slope**2 + 4 * lead * rest)) / (2 * lead)


def bounded_mean(
    values: ArrayLike, confidence: float, weights: ArrayLike | None = None
) -> Estimate:
    """Mean of values in [0, 1], or sum(weights * values) / sum(weights), each value then being a
    share of `weights` observations."""
    x = _floats(values)
    w = np.ones_like(x) if weights is None else _floats(weights)
    n, p = len(x), min(1.0, float((w * x).sum() / w.sum()))
    variance = n * float(((w * (x - p)) ** 2).sum()) / float(w.sum()) ** 2
    whole = p * (1 - p)
    size = min(n * whole / variance, float(w.sum())) if variance > 0 and whole > 0 else n
    return _share(n, p, size, weights is not None, confidence)


def _share(n: int, p: float, size: float, clustered: bool, confidence: float) -> Estimate:
    """Interval of a share p seen in n clusters that are worth `size` observations."""
    whole = p * (1 - p)

    def standard_error(pairs: float) -> float:
        return math.sqrt((whole * n / size + 1 / (pairs + 2)) / pairs)

    def interval(pairs: float, confidence: float) -> Ends:
        unsure = 1.0
        if clustered and pairs > 1:
            unsure = (_z(confidence) / t_quantile((1 + confidence) / 2, pairs - 1)) ** 2
        count = size * pairs / n * unsure
        seen, tail = p * count, (1 - confidence) / 2
        low = float(betaincinv(seen, count - seen + 1, tail)) if seen > 0 else 0.0
        high = float(betaincinv(seen + 1, count - seen, 1 - tail)) if seen < count else 1.0
        return low, high

    def assuming(value: float) -> Estimate:
        return _share(n, value, size, clustered, confidence)

    return make_estimate(p, n, confidence, standard_error, interval, assuming)


def median_of(clusters: Sequence[ArrayLike], confidence: float) -> Estimate:
    """Median of the values of all clusters, each an array of any length."""
    every = [_floats(cluster) for cluster in clusters]
    values = np.concatenate(every)
    median, n = float(np.median(values)), len(every)
    if n == 1 or not np.isfinite(median):
        return _unknown(median, n)
    below = np.array([(cluster <= median).sum() for cluster in every], dtype=np.float64)
    sizes = np.array([len(cluster) for cluster in every], dtype=np.float64)
    share = below.sum() / sizes.sum()
    influence = (below - share * sizes) / sizes.sum()
    spread = math.sqrt(float(influence @ influence) * n / (n - 1) * n)

    def interval(pairs: float, confidence: float) -> Ends:
        reach = t_quantile((1 + confidence) / 2, pairs - 1) * spread / math.sqrt(pairs)
        low, high = np.quantile(values, np.clip([0.5 - reach, 0.5 + reach], 0, 1))
        return float(low), float(high)

    def standard_error(pairs: float) -> float:
        low, high = interval(pairs, confidence)
        return (high - low) / 2 / t_quantile((1 + confidence) / 2, pairs - 1)

    def assuming(value: float) -> Estimate:
        return median_of([cluster + (value - median) for cluster in every], confidence)

    return make_estimate(median, n, confidence, standard_error, interval, assuming)


def quantile_ratio(a: ArrayLike, b: ArrayLike, q: float, confidence: float, seed: int) -> Estimate:
    """Ratio of the q-quantiles of b and of a, paired and in the order of time."""
    x, y = _floats(a), _floats(b)
    n = len(x)
    value = float(np.quantile(y, q) / np.quantile(x, q))
    generator = np.random.default_rng(seed)
    block = max(1, round(n ** (1 / 3)))
    parts = []
    for _ in range(0, RESAMPLES, step := max(1, min(RESAMPLES, CHUNK // n))):
        starts = generator.integers(0, n, (step, -(-n // block)))
        picks = (starts[:, :, None] + np.arange(block)) % n
        picks = picks.reshape(step, -1)[:, :n]
        parts.append(np.quantile(y[picks], q, axis=1) / np.quantile(x[picks], q, axis=1))
    logs = np.log(np.concatenate(parts))
    return _bootstrapped(value, n, logs - math.log(value), confidence)


def _bootstrapped(value: float, n: int, away: Array, confidence: float) -> Estimate:
    """A ratio and how far, on logs, its resamples were away from it."""
    spread = float(away.std()) * math.sqrt(n)

    def interval(pairs: float, confidence: float) -> Ends:
        tails = np.quantile(away, [(1 - confidence) / 2, (1 + confidence) / 2])
        low, high = value * np.exp(tails * math.sqrt(n / pairs))
        return float(low), float(high)

    def standard_error(pairs: float) -> float:
        return spread / math.sqrt(pairs)

    def assuming(other: float) -> Estimate:
        return _bootstrapped(other, n, away, confidence)

    return make_estimate(value, n, confidence, standard_error, interval, assuming, log=True)


def _student(
    centre: float, influence: Array, confidence: float, serial: bool = False, log: bool = False
) -> Estimate:
    """Interval from what each pair adds to the estimate; `influence` sums to nothing."""
    n = len(influence)
    natural = _exp if log else float
    if n == 1:
        return _unknown(natural(centre), n, log)
    if serial:
        squares = [(wave_square(influence), waves), (memory_square(influence), one_less)]
    else:
        squares = [(float(influence @ influence) / (n - 1), one_less)]
    spread = n * math.sqrt(max(square for square, _ in squares))

    def interval(pairs: float, confidence: float) -> Ends:
        p = (1 + confidence) / 2
        reaches = (t_quantile(p, free(pairs)) * math.sqrt(square) for square, free in squares)
        reach = n * max(reaches) / math.sqrt(pairs)
        return natural(centre - reach), natural(centre + reach)

    def standard_error(pairs: float) -> float:
        return spread / math.sqrt(pairs)

    def assuming(value: float) -> Estimate:
        return _student(math.log(value) if log else value, influence, confidence, serial, log)

    return make_estimate(natural(centre), n, confidence, standard_error, interval, assuming, log)


def _unknown(value: float, n: int, log: bool = False) -> Estimate:
    """One pair, or none that is a number, says nothing of how sure it is."""
    ends = 0.0 if log else -math.inf, math.inf
    return Estimate(
        value, *ends, n, lambda _: math.inf, lambda *_: ends, lambda v: _unknown(v, n), log
    )


@functools.cache
def _z(confidence: float) -> float:
    return NormalDist().inv_cdf((1 + confidence) / 2)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _floats(values: ArrayLike) -> Array:
    return np.asarray(values, dtype=np.float64)
