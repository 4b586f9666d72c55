"""Estimates with confidence intervals from pairs: one observation of A and of B per prompt,
or of an original and its compressed form per held-out sequence.

The prompt (the sequence) is the unit that was drawn at random, so every interval is over prompts,
tokens of one prompt counting as one cluster. One estimator per kind of number:

    ratio of totals                  ratio estimator, linearised variance (Cochran, Sampling
                                     Techniques, ch. 6), Student's t; ratios on the log scale
    mean per token of what is skewed the same with Hall's correction (J. Royal Stat. Soc. B 54,
                                     1992): KL has a long right tail, and its upper end decides
    mean of paired log ratios        Student's t on the logs: a geometric mean
    difference of values in [0, 1]   adjusted Wald of Bonett and Price (2012), here for any
                                     bounded pair: one more pair of each extreme is added, so that
                                     no difference seen is not taken for none there is
    mean of values in [0, 1]         Wilson's score interval, wide enough whatever their
                                     distribution; for shares of tokens its n is what the
                                     variance between prompts says, at most the tokens
    ratio of quantiles               percentile bootstrap over blocks of neighbouring prompts
    median of all tokens             Woodruff's interval (J. Am. Stat. Assoc. 47, 1952): where
                                     the share of tokens below, and its error, put the ends

Latencies of neighbouring requests are not independent (queues, a disturbed machine): their
variances get Bartlett-weighted autocovariances (Newey and West, 1987) over n^(1/3) neighbours.

Fails where: fewer than some twenty prompts (the normal approximation); quantiles with less than
five observations beyond them; a KL so skewed that a few prompts make up most of it (simulated with
a log-normal one of sigma 1 and 100 prompts: an upper end too low in 4.7% instead of 2.5%).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Not scipy.stats, which takes a second to import and asks the same function.
from scipy.special import stdtrit  # type: ignore[import-untyped]

Array = NDArray[np.float64]
RESAMPLES = 2000
CHUNK = 2**22


@dataclass(frozen=True)
class Estimate:
    """A value, its interval, the number of pairs behind it. `log` tells that it is a ratio, whose
    error is measured on logs; `standard_error(n)` is what n pairs like these would give there.
    `proportional` tells that this error would be larger as the value is. Where only bounds of the
    value are known, `value` is the lower and `most` the upper one, and the interval holds both."""

    value: float
    low: float
    high: float
    n: int
    standard_error: Callable[[float], float] = field(repr=False, compare=False)
    log: bool = False
    proportional: bool = False
    most: float | None = None


def t_quantile(p: float, df: int) -> float:
    """Quantile of Student's t."""
    return float(stdtrit(df, p))


def mean_log_ratio(a: ArrayLike, b: ArrayLike, confidence: float, serial: bool) -> Estimate:
    """Geometric mean of b / a, both positive, in the order of time where they are `serial`."""
    logs = np.log(_floats(b)) - np.log(_floats(a))
    return _student(float(logs.mean()), (logs - logs.mean()) / len(logs), confidence, serial, True)


def mean_per(total: ArrayLike, count: ArrayLike, confidence: float) -> Estimate:
    """sum(total) / sum(count), such as nats per token from those of every prompt; skewed."""
    y, x = _floats(total), _floats(count)
    mean = y.sum() / x.sum()
    return _student(float(mean), (y - mean * x) / x.sum(), confidence, skewed=True)


def mean_between(
    least: ArrayLike, most: ArrayLike, count: ArrayLike, confidence: float
) -> Estimate:
    """`mean_per` of a total of which two bounds are known: from the lower end of the one to the
    upper end of the other."""
    below = mean_per(least, count, confidence)
    if not np.isfinite(_floats(most)).all():
        return replace(below, high=math.inf, most=math.inf)
    above = mean_per(most, count, confidence)
    return replace(above, value=below.value, low=below.low, most=above.value)


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
    n, first, second = len(d), float(d.mean()), float((d**2).mean())

    def standard_error(pairs: float) -> float:
        mean, square = first * pairs / (pairs + 2), (second * pairs + 2) / (pairs + 2)
        return math.sqrt(max(0.0, square - mean**2) / (pairs + 2))

    centre = first * n / (n + 2)
    half = _z(confidence) * standard_error(n)
    return Estimate(first, max(-1.0, centre - half), min(1.0, centre + half), n, standard_error)


def bounded_mean(
    values: ArrayLike, confidence: float, weights: ArrayLike | None = None
) -> Estimate:
    """Mean of values in [0, 1], or sum(weights * values) / sum(weights), each value then being a
    share of `weights` observations."""
    x = _floats(values)
    w = np.ones_like(x) if weights is None else _floats(weights)
    n, p = len(x), float((w * x).sum() / w.sum())
    variance = n * float(((w * (x - p)) ** 2).sum()) / float(w.sum()) ** 2
    whole = p * (1 - p)
    size = min(n * whole / variance, float(w.sum())) if variance > 0 and whole > 0 else n
    z = _z(confidence)
    centre = (p + z**2 / (2 * size)) / (1 + z**2 / size)
    half = z / (1 + z**2 / size) * math.sqrt(whole / size + z**2 / (4 * size**2))

    def standard_error(pairs: float) -> float:
        return math.sqrt((whole * n / size + 1 / (pairs + 2)) / pairs)

    return Estimate(p, max(0.0, centre - half), min(1.0, centre + half), n, standard_error)


def median_of(clusters: Sequence[ArrayLike], confidence: float) -> Estimate:
    """Median of the values of all clusters, each an array of any length."""
    every = [_floats(cluster) for cluster in clusters]
    values = np.concatenate(every)
    median, n = float(np.median(values)), len(every)
    if n == 1 or not np.isfinite(median):
        return Estimate(median, -math.inf, math.inf, n, lambda _: math.inf)
    below = np.array([(cluster <= median).sum() for cluster in every], dtype=np.float64)
    sizes = np.array([len(cluster) for cluster in every], dtype=np.float64)
    share = below.sum() / sizes.sum()
    error = math.sqrt(_variance((below - share * sizes) / sizes.sum(), serial=False))
    reach = t_quantile((1 + confidence) / 2, n - 1) * error
    low, high = np.quantile(values, np.clip([0.5 - reach, 0.5 + reach], 0, 1))
    spread = float(high - low) / 2 / t_quantile((1 + confidence) / 2, n - 1) * math.sqrt(n)
    return Estimate(median, float(low), float(high), n, lambda m: spread / math.sqrt(m))


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
    low, high = np.exp(np.quantile(logs, [(1 - confidence) / 2, (1 + confidence) / 2]))
    spread = float(logs.std()) * math.sqrt(n)
    return Estimate(value, float(low), float(high), n, lambda m: spread / math.sqrt(m), log=True)


def _student(
    centre: float,
    influence: Array,
    confidence: float,
    serial: bool = False,
    log: bool = False,
    skewed: bool = False,
) -> Estimate:
    """Interval from what each pair adds to the estimate; `influence` sums to nothing."""
    n = len(influence)
    natural = _exp if log else float
    if n == 1:
        never = natural(-math.inf), natural(math.inf)
        return Estimate(natural(centre), *never, n, lambda _: math.inf, log)
    error = math.sqrt(_variance(influence, serial))
    quantile = t_quantile((1 + confidence) / 2, n - 1)
    ends = [_unskewed(t, influence) if skewed else t for t in (quantile, -quantile)]
    low, high = (centre - error * t for t in ends)
    spread = error * math.sqrt(n)
    return Estimate(
        natural(centre),
        natural(low),
        natural(high),
        n,
        lambda m: spread / math.sqrt(m),
        log,
        skewed,
    )


def _unskewed(t: float, influence: Array) -> float:
    """Where a mean of skewed values has the quantile that it would have at `t` without."""
    n, square = len(influence), float((influence**2).mean())
    skew = float((influence**3).mean()) / square**1.5 / math.sqrt(n) if square else 0.0
    if abs(skew) < 1e-6:
        return t
    return 3 / skew * (float(np.cbrt(1 + skew * (t - skew / 6))) - 1)


def _variance(influence: Array, serial: bool) -> float:
    """Estimate the variance of the sum of `influence`; `serial` neighbours are correlated."""
    n = len(influence)
    alone = total = float(influence @ influence)
    for lag in range(1, round(n ** (1 / 3)) + 1 if serial else 1):
        weight = 2 * (1 - lag / (round(n ** (1 / 3)) + 1))
        total += weight * float(influence[lag:] @ influence[:-lag])
    return max(alone, total) * n / (n - 1)


@functools.cache
def _z(confidence: float) -> float:
    return NormalDist().inv_cdf((1 + confidence) / 2)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _floats(values: ArrayLike) -> Array:
    return np.asarray(values, dtype=np.float64)
