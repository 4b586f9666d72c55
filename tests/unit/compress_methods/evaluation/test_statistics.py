"""Intervals of paired observations cover as often as they say, and are no wider than they must."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress_methods.evaluation import statistics
from tests.unit.compress_methods.evaluation.draws import (
    LEVEL,
    Draw,
    agreement,
    divergence,
    divergence_of_powers,
    latency,
    losses,
    perplexity,
    rate,
    same_tokens,
    slowest,
    tasks,
    throughput,
)


def covered(draw: Draw, truth: float, times: int = 600) -> float:
    """Share of intervals that hold the truth."""
    generator = np.random.default_rng(1)
    found = [draw(generator) for _ in range(times)]
    return float(np.mean([one.low <= truth <= one.high for one in found]))


@pytest.mark.parametrize(
    ("draw", "truth"),
    [
        (perplexity(30, 1.01), 1.01),
        (divergence(60, 0.03), 0.03),
        (latency(25, 1.3), 1.3),
        (throughput(80, 0.8), 0.8),
        (tasks(60, -0.04), -0.04),
        (tasks(150, 0.0, solved=0.9), 0.0),
        (agreement(60, 0.8), 0.8),
        (agreement(30, 0.97), 0.97),
        (same_tokens(60), 0.98),
    ],
)
def test_intervals_hold_the_truth_as_often_as_they_say(draw: Draw, truth: float) -> None:
    # Of 600 draws, 95% are between 92.5 and 97.5. Values in [0, 1] may get wider intervals.
    assert covered(draw, truth) >= 0.925


@pytest.mark.parametrize("n", [20, 40, 100])
@pytest.mark.parametrize(
    ("make", "truth"),
    [
        (lambda n: divergence(n, 0.03), 0.03),
        (lambda n: divergence(n, 0.03, sigma=1.0), 0.03),
        (lambda n: divergence(n, 0.03, sigma=1.5), 0.03),
        (lambda n: divergence_of_powers(n, 0.03), 0.03),
        (lambda n: latency(n, 1.1, memory=0.3), 1.1),
        (lambda n: latency(n, 1.1, memory=0.6), 1.1),
        *((lambda n, p=p: rate(n, p), p) for p in (0.9, 0.95, 0.98, 0.99, 0.999)),
        (lambda n: agreement(n, 0.98), 0.98),
        (lambda n: same_tokens(n), 0.98),
        (lambda n: losses(n, 0.02), -0.02),
        (lambda n: losses(n, 0.1), -0.1),
    ],
)
def test_what_is_hard_to_cover_is_covered(
    make: Callable[[int], Draw], truth: float, n: int
) -> None:
    """Heavy tails, memory, rates near 1, at as many prompts as people have."""
    assert covered(make(n), truth, 400) >= 0.93


def test_no_number_of_prompts_makes_an_interval_too_wide_for_its_data() -> None:
    """What is no log-normal is not taken for one where there is enough of it to tell."""
    generator = np.random.default_rng(6)
    sizes = np.full(3000, 100.0)
    for values in (generator.lognormal(0, 0.6, 3000), generator.gamma(0.5, 1, 3000)):
        found = statistics.mean_per(sizes * values, sizes, LEVEL)
        true_width = 2 * 1.96 * values.std() / math.sqrt(3000)
        assert found.high - found.low < 2 * true_width


def test_an_interval_foretells_that_of_more_prompts() -> None:
    generator = np.random.default_rng(7)
    for make in (
        lambda n: divergence(n, 0.03, sigma=1.0),
        lambda n: latency(n, 1.1, memory=0.3),
        lambda n: tasks(n, -0.04),
        lambda n: same_tokens(n),
    ):
        few, many = make(2000)(generator), make(8000)(generator)
        low, high = few.interval(8000, LEVEL)
        assert high - low == pytest.approx(many.high - many.low, rel=0.25)
        same = few.assuming(few.value)
        assert (same.low, same.high) == pytest.approx((few.low, few.high))


def test_intervals_of_percentiles_hold_the_truth_nine_times_in_ten_or_more() -> None:
    assert covered(slowest(150, 1.2), 1.2, 100) >= 0.9


def test_intervals_are_not_wider_than_the_data_ask_for() -> None:
    generator = np.random.default_rng(4)
    for draw in (perplexity(100, 1.01), divergence(100, 0.03), latency(100, 1.3), same_tokens(100)):
        values = [draw(generator) for _ in range(300)]
        true_width = 2 * 1.96 * np.std([one.value for one in values])
        assert np.mean([one.high - one.low for one in values]) < 1.3 * true_width


def test_neighbours_that_are_alike_need_the_wider_interval() -> None:
    assert covered(latency(200, 1.1, memory=0.6), 1.1, 300) > 0.92
    assert covered(latency(200, 1.1, memory=0.6, serial=False), 1.1, 300) < 0.72


@given(st.integers(1, 700), st.floats(0.51, 0.999))
def test_t_quantiles_invert_the_integral_of_the_density(df: int, p: float) -> None:
    t = statistics.t_quantile(p, df)
    x = np.linspace(0, t, 20001)
    scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    density = scale * (1 + x**2 / df) ** (-(df + 1) / 2)
    area = float((density[1:] + density[:-1]).sum() * (x[1] - x[0]) / 2)
    assert area + 0.5 == pytest.approx(p, abs=1e-5)
    assert statistics.t_quantile(1 - p, df) == pytest.approx(-t)
