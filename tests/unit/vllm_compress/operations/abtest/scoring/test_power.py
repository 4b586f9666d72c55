"""How many more prompts: from forty, a number that decides four times in five."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from compress_methods.evaluation import statistics
from compress_methods.evaluation.statistics import Array, Estimate
from tests.unit.compress_methods.evaluation.draws import LEVEL
from vllm_compress.operations.abtest.scoring.judge import (
    NON_INFERIOR,
    UNDECIDED,
    Limit,
    decide,
    judge,
)

PILOT = 40
MOST = 20_000
Columns = tuple[Array, ...]
Sample = Callable[[np.random.Generator, int], Columns]


def nats(sigma: float) -> Sample:
    """Prompts that B finds as likely as A on average; totals and tokens."""

    def draw(g: np.random.Generator, n: int) -> Columns:
        tokens = g.integers(20, 200, n).astype(float)
        return tokens * sigma * g.standard_t(5, n), tokens

    return draw


def divergences(mean: float, sigma: float) -> Sample:
    def draw(g: np.random.Generator, n: int) -> Columns:
        tokens = g.integers(20, 200, n).astype(float)
        return tokens * mean * g.lognormal(-(sigma**2) / 2, sigma, n), tokens

    return draw


def answers(lost: float, gained: float) -> Sample:
    def draw(g: np.random.Generator, n: int) -> Columns:
        at = g.random(n)
        found = (at >= lost + gained) | (at < lost)
        return found.astype(float), (at >= lost).astype(float)

    return draw


def times(ratio: float, memory: float) -> Sample:
    def draw(g: np.random.Generator, n: int) -> Columns:
        noise = g.normal(size=n + 50)
        for i in range(1, n + 50):
            noise[i] += memory * noise[i - 1]
        a = g.lognormal(0, 1, n)
        return a, a * ratio * np.exp(0.2 * noise[50:])

    return draw


def outcomes(p: float) -> Sample:
    return lambda g, n: ((g.random(n) < p).astype(float),)


def perplexity(*columns: Array) -> Estimate:
    return statistics.exp_mean_per(*columns, LEVEL)


def divergence(*columns: Array) -> Estimate:
    return statistics.mean_per(*columns, LEVEL)


def difference(*columns: Array) -> Estimate:
    return statistics.bounded_difference(*columns, LEVEL)


def latency(*columns: Array) -> Estimate:
    return statistics.mean_log_ratio(*columns, LEVEL, serial=True)


def share(*columns: Array) -> Estimate:
    return statistics.bounded_mean(*columns, LEVEL)


@pytest.mark.parametrize(
    ("estimate", "sample", "limit"),
    [
        (perplexity, nats(0.05), Limit(1.02, "above")),
        (perplexity, nats(0.08), Limit(1.02, "above")),
        (divergence, divergences(0.035, 0.6), Limit(0.05, "above")),
        (divergence, divergences(0.03, 1.0), Limit(0.05, "above")),
        (difference, answers(0.02, 0.02), Limit(-0.05, "below")),
        (difference, answers(0.05, 0.05), Limit(-0.05, "below")),
        (difference, answers(0.02, 0.0), Limit(-0.05, "below")),
        (latency, times(1.03, 0.0), Limit(1.1, "above")),
        (latency, times(1.03, 0.6), Limit(1.1, "above")),
        (share, outcomes(0.97), Limit(0.93, "below")),
        (share, outcomes(0.99), Limit(0.93, "below")),
    ],
)
def test_the_number_of_prompts_asked_for_decides_four_times_in_five(
    estimate: Callable[..., Estimate], sample: Sample, limit: Limit
) -> None:
    """The pilot stays in, as it does where prompts are appended to a file."""
    generator = np.random.default_rng(2)
    decided: list[bool] = []
    for _ in range(60):
        pilot = sample(generator, PILOT)
        first = judge(estimate(*pilot), limit, LEVEL)
        if first.verdict != UNDECIDED or first.needed is None:
            continue
        more = sample(generator, min(first.needed, MOST) - PILOT)
        whole: Any = (np.concatenate(parts) for parts in zip(pilot, more, strict=True))
        decided.append(decide(estimate(*whole), limit) == NON_INFERIOR)
    assert len(decided) > 10
    assert np.mean(decided) >= 0.8


def test_a_number_grows_where_the_value_nears_its_margin_and_ends_at_it() -> None:
    generator = np.random.default_rng(3)
    noise = generator.normal(size=60) * 0.4
    noise -= noise.mean()
    needs = []
    for ratio in (1.02, 1.06, 1.08, 1.1):
        found = statistics.mean_log_ratio(np.ones(60), ratio * np.exp(noise), LEVEL, False)
        needs.append(judge(found, Limit(1.1, "above"), LEVEL).needed or math.inf)
    assert needs == sorted(needs)
    assert needs[0] < needs[-1]
