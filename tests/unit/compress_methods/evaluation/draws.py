"""Pairs drawn at random whose true change is known."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from compress_methods.evaluation import statistics
from compress_methods.evaluation.statistics import Array, Estimate

LEVEL = 0.95
Draw = Callable[[np.random.Generator], Estimate]


def clusters(generator: np.random.Generator, n: int, mean: float) -> tuple[Array, Array]:
    """Totals and sizes of n clusters whose observations average `mean`, long ones varying more."""
    sizes = generator.integers(20, 200, n).astype(float)
    return sizes * (mean + 0.02 * generator.normal(size=n) * (1 + sizes / 100)), sizes


def perplexity(n: int, ratio: float) -> Draw:
    return lambda g: statistics.exp_mean_per(*clusters(g, n, math.log(ratio)), LEVEL)


def divergence(n: int, mean: float, sigma: float = 0.6) -> Draw:
    """Skewed to the right, as KL is; with sigma 1.5 one prompt has ten times what most have."""

    def draw(g: np.random.Generator) -> Estimate:
        sizes = g.integers(20, 200, n).astype(float)
        per_token = mean * g.lognormal(-(sigma**2) / 2, sigma, n)
        return statistics.mean_per(sizes * per_token, sizes, LEVEL)

    return draw


def divergence_of_powers(n: int, mean: float) -> Draw:
    """A tail that falls with the fourth power: no log-normal."""

    def draw(g: np.random.Generator) -> Estimate:
        sizes = g.integers(20, 200, n).astype(float)
        return statistics.mean_per(sizes * mean * 2 * g.pareto(3, n), sizes, LEVEL)

    return draw


def latency(n: int, ratio: float, memory: float = 0.0, serial: bool = True) -> Draw:
    """Prompts of very different lengths; noise that remembers its neighbours."""

    def draw(g: np.random.Generator) -> Estimate:
        noise = g.normal(size=n + 50)
        for i in range(1, n + 50):
            noise[i] += memory * noise[i - 1]
        a = g.lognormal(0, 1, n)
        return statistics.mean_log_ratio(a, a * ratio * np.exp(0.2 * noise[50:]), LEVEL, serial)

    return draw


def throughput(n: int, ratio: float) -> Draw:
    def draw(g: np.random.Generator) -> Estimate:
        a, b = g.integers(1, 64, (2, n)).astype(float)
        times = a * g.lognormal(0, 0.2, n), b / ratio * g.lognormal(0, 0.2, n)
        return statistics.ratio_of_rates((a, times[0]), (b, times[1]), LEVEL, serial=True)

    return draw


def slowest(n: int, ratio: float) -> Draw:
    def draw(g: np.random.Generator) -> Estimate:
        a = g.lognormal(0, 0.5, n)
        b = a * ratio * g.lognormal(0, 0.1, n)
        return statistics.quantile_ratio(a, b, 0.95, LEVEL, seed=int(g.integers(2**31)))

    return draw


def tasks(n: int, change: float, solved: float = 0.7) -> Draw:
    """Task scores of 0 or 1: B loses some that A has, and finds some that A has not."""

    def draw(g: np.random.Generator) -> Estimate:
        swap = 0.05 + max(0.0, change), 0.05 - min(0.0, change)  # gained, lost
        at = g.random(n)
        a = np.where(at < solved, 1.0, 0.0)
        flip = g.random(n)
        gained = (a == 0) & (flip < swap[0] / (1 - solved))
        lost = (a == 1) & (flip < swap[1] / solved)
        return statistics.bounded_difference(a, a + gained - lost, LEVEL)

    return draw


def partial_scores(n: int, change: float) -> Draw:
    def draw(g: np.random.Generator) -> Estimate:
        a = g.beta(2, 2, n)
        b = np.clip(a + change + 0.1 * g.uniform(-1, 1, n), 0, 1)
        return statistics.bounded_difference(a, b, LEVEL)

    return draw


def agreement(n: int, p: float) -> Draw:
    """Most outputs the same to the end, the others parting anywhere."""

    def draw(g: np.random.Generator) -> Estimate:
        whole = g.random(n) < 2 * p - 1
        return statistics.bounded_mean(np.where(whole, 1.0, g.random(n)), LEVEL)

    return draw


def rate(n: int, p: float) -> Draw:
    """Yes or no."""
    return lambda g: statistics.bounded_mean((g.random(n) < p).astype(float), LEVEL)


def losses(n: int, lost: float) -> Draw:
    """Answers of which A has all, and B all but a few."""

    def draw(g: np.random.Generator) -> Estimate:
        return statistics.bounded_difference(np.ones(n), (g.random(n) >= lost) * 1.0, LEVEL)

    return draw


def same_tokens(n: int) -> Draw:
    """Shares of the tokens of each prompt, prompts differing little; 0.98 in all."""

    def draw(g: np.random.Generator) -> Estimate:
        sizes = g.integers(50, 150, n).astype(float)
        return statistics.bounded_mean(
            g.binomial(sizes.astype(int), g.beta(98, 2, n)) / sizes, LEVEL, sizes
        )

    return draw
