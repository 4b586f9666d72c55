"""Intervals cover, verdicts err no more often than they say, needed numbers reach their power."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.streaming_server import VOCABULARY
from vllm_compress.abtest import statistics as stats
from vllm_compress.abtest.judge import (
    INFERIOR,
    LEAST_PAIRS,
    NON_INFERIOR,
    UNDECIDED,
    Judgement,
    Limit,
    judge,
    needed_pairs,
    overall,
)
from vllm_compress.abtest.logprobs import compare_logprobs
from vllm_compress.abtest.measure import busy_shares
from vllm_compress.abtest.statistics import Array, Estimate

LEVEL = 0.95
Draw = Callable[[np.random.Generator], Estimate]


def clusters(generator: np.random.Generator, n: int, mean: float) -> tuple[Array, Array]:
    """Totals and sizes of n clusters whose observations average `mean`, long ones varying more."""
    sizes = generator.integers(20, 200, n).astype(float)
    return sizes * (mean + 0.02 * generator.normal(size=n) * (1 + sizes / 100)), sizes


def perplexity(n: int, ratio: float) -> Draw:
    return lambda g: stats.exp_mean_per(*clusters(g, n, math.log(ratio)), LEVEL)


def divergence(n: int, mean: float) -> Draw:
    """Skewed to the right, as KL is."""

    def draw(g: np.random.Generator) -> Estimate:
        sizes = g.integers(20, 200, n).astype(float)
        per_token = mean * g.lognormal(-0.18, 0.6, n)
        return stats.mean_per(sizes * per_token, sizes, LEVEL)

    return draw


def latency(n: int, ratio: float, memory: float = 0.0, serial: bool = True) -> Draw:
    """Prompts of very different lengths; noise that remembers its neighbours."""

    def draw(g: np.random.Generator) -> Estimate:
        noise = g.normal(size=n + 50)
        for i in range(1, n + 50):
            noise[i] += memory * noise[i - 1]
        a = g.lognormal(0, 1, n)
        return stats.mean_log_ratio(a, a * ratio * np.exp(0.2 * noise[50:]), LEVEL, serial)

    return draw


def throughput(n: int, ratio: float) -> Draw:
    def draw(g: np.random.Generator) -> Estimate:
        a, b = g.integers(1, 64, (2, n)).astype(float)
        times = a * g.lognormal(0, 0.2, n), b / ratio * g.lognormal(0, 0.2, n)
        return stats.ratio_of_rates((a, times[0]), (b, times[1]), LEVEL, serial=True)

    return draw


def slowest(n: int, ratio: float) -> Draw:
    def draw(g: np.random.Generator) -> Estimate:
        a = g.lognormal(0, 0.5, n)
        b = a * ratio * g.lognormal(0, 0.1, n)
        return stats.quantile_ratio(a, b, 0.95, LEVEL, seed=int(g.integers(2**31)))

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
        return stats.bounded_difference(a, a + gained - lost, LEVEL)

    return draw


def partial_scores(n: int, change: float) -> Draw:
    def draw(g: np.random.Generator) -> Estimate:
        a = g.beta(2, 2, n)
        b = np.clip(a + change + 0.1 * g.uniform(-1, 1, n), 0, 1)
        return stats.bounded_difference(a, b, LEVEL)

    return draw


def agreement(n: int, p: float) -> Draw:
    """Most outputs the same to the end, the others parting anywhere."""

    def draw(g: np.random.Generator) -> Estimate:
        whole = g.random(n) < 2 * p - 1
        return stats.bounded_mean(np.where(whole, 1.0, g.random(n)), LEVEL)

    return draw


def same_tokens(n: int) -> Draw:
    """Shares of the tokens of each prompt, prompts differing little; 0.98 in all."""

    def draw(g: np.random.Generator) -> Estimate:
        sizes = g.integers(50, 150, n).astype(float)
        return stats.bounded_mean(
            g.binomial(sizes.astype(int), g.beta(98, 2, n)) / sizes, LEVEL, sizes
        )

    return draw


def covered(draw: Draw, truth: float, times: int = 600) -> float:
    """Share of intervals that hold the truth."""
    generator = np.random.default_rng(1)
    found = [draw(generator) for _ in range(times)]
    return float(np.mean([one.low <= truth <= one.high for one in found]))


def verdicts(draw: Draw, limit: Limit, times: int = 1500) -> dict[str, float]:
    """Share of every verdict."""
    generator = np.random.default_rng(2)
    found = [judge(draw(generator), limit, LEVEL).verdict for _ in range(times)]
    return {name: found.count(name) / times for name in (NON_INFERIOR, INFERIOR, UNDECIDED)}


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


def test_intervals_of_percentiles_hold_the_truth_nine_times_in_ten_or_more() -> None:
    assert covered(slowest(150, 1.2), 1.2, 100) >= 0.9


def test_intervals_are_not_wider_than_the_data_ask_for() -> None:
    generator = np.random.default_rng(4)
    for draw in (perplexity(100, 1.01), divergence(100, 0.03), latency(100, 1.3), same_tokens(100)):
        values = [draw(generator) for _ in range(300)]
        true_width = 2 * 1.96 * np.std([one.value for one in values])
        assert np.mean([one.high - one.low for one in values]) < 1.2 * true_width


def test_neighbours_that_are_alike_need_the_wider_interval() -> None:
    assert covered(latency(200, 1.1, memory=0.6), 1.1, 300) > 0.85
    assert covered(latency(200, 1.1, memory=0.6, serial=False), 1.1, 300) < 0.72


@pytest.mark.parametrize(
    ("draw", "limit"),
    [
        (perplexity(40, 1.02), Limit(1.02, "above")),
        (divergence(300, 0.05), Limit(0.05, "above")),
        (latency(60, 1.1), Limit(1.1, "above")),
        (tasks(150, -0.02), Limit(-0.02, "below")),
        (partial_scores(60, -0.0), Limit(0.0, "below")),
        (agreement(100, 0.8), Limit(0.8, "below")),
    ],
)
def test_a_server_at_its_margin_passes_and_fails_rarely(draw: Draw, limit: Limit) -> None:
    """Either way at most (1 - 0.95) / 2, and three standard errors of this simulation."""
    allowed = 0.025 + 3 * math.sqrt(0.025 * 0.975 / 1500)
    found = verdicts(draw, limit)
    assert found[NON_INFERIOR] <= allowed
    assert found[INFERIOR] <= allowed


def test_clear_cases_are_decided() -> None:
    limit = Limit(1.02, "above")
    assert verdicts(perplexity(150, 1.0), limit, 300)[NON_INFERIOR] > 0.95
    assert verdicts(perplexity(150, 1.06), limit, 300)[INFERIOR] > 0.95
    both = Limit(1.2, "both")
    assert verdicts(throughput(200, 1.0), both, 100)[NON_INFERIOR] > 0.9
    assert verdicts(throughput(200, 0.6), both, 100)[INFERIOR] > 0.9
    assert verdicts(throughput(200, 1.7), both, 100)[INFERIOR] > 0.9


@pytest.mark.parametrize(
    ("make", "truth", "limit"),
    [
        (perplexity, 1.012, Limit(1.02, "above")),
        (latency, 1.02, Limit(1.1, "above")),
        (tasks, 0.0, Limit(-0.04, "below")),
        (divergence, 0.045, Limit(0.05, "above")),
    ],
)
def test_the_number_of_prompts_asked_for_decides_four_times_in_five(
    make: Callable[[int, float], Draw], truth: float, limit: Limit
) -> None:
    pilot = make(4000, truth)(np.random.default_rng(3))
    needed = needed_pairs(replace(pilot, value=truth, n=25), limit, LEVEL)
    assert needed is not None
    assert needed > LEAST_PAIRS
    assert 0.74 <= verdicts(make(needed, truth), limit, 600)[NON_INFERIOR] <= 0.88


def test_equal_answers_are_no_proof_that_none_differs() -> None:
    """No difference in n pairs: n has to be large enough to exclude the margin."""
    few, many = (stats.bounded_difference([1.0] * n, [1.0] * n, LEVEL) for n in (30, 300))
    limit = Limit(-0.02, "below")
    assert judge(few, limit, LEVEL).verdict == UNDECIDED
    assert judge(many, limit, LEVEL).verdict == NON_INFERIOR
    needed = judge(few, limit, LEVEL).needed
    assert needed is not None
    assert 30 < needed < 300
    assert stats.bounded_mean([1.0] * 30, LEVEL).low < 0.9


def test_a_handful_of_pairs_decides_nothing_and_one_is_survived() -> None:
    same = stats.mean_log_ratio([1.0] * 5, [1.0] * 5, LEVEL, True)
    assert judge(same, Limit(1.1, "above"), LEVEL) == Judgement(UNDECIDED, LEAST_PAIRS)
    one = stats.mean_log_ratio([1.0], [2.0], LEVEL, True)
    assert (one.low, one.high) == (0, math.inf)
    assert judge(one, Limit(1.1, "above"), LEVEL).verdict == UNDECIDED
    assert judge(None, Limit(1.1, "above"), LEVEL) == Judgement(UNDECIDED)


def test_at_the_margin_no_number_of_prompts_is_enough() -> None:
    values = 1.1 * np.exp(np.random.default_rng(0).normal(size=50))
    values *= 1.1 / np.exp(np.log(values).mean())
    at = stats.mean_log_ratio(np.ones(50), values, LEVEL, False)
    assert judge(at, Limit(1.1, "above"), LEVEL) == Judgement(UNDECIDED, None)


def test_the_whole_is_as_good_as_the_worst_metric() -> None:
    good, bad = Judgement(NON_INFERIOR), Judgement(INFERIOR)
    open_, stuck = Judgement(UNDECIDED, 300), Judgement(UNDECIDED)
    assert overall([good, good]) == good
    assert overall([good, open_, bad]) == bad
    assert overall([good, open_, Judgement(UNDECIDED, 50)]) == open_
    assert overall([open_, stuck]) == stuck
    assert overall([]).verdict == UNDECIDED


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 700), st.floats(0.51, 0.999))
def test_t_quantiles_invert_the_integral_of_the_density(df: int, p: float) -> None:
    t = stats.t_quantile(p, df)
    x = np.linspace(0, t, 20001)
    scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    density = scale * (1 + x**2 / df) ** (-(df + 1) / 2)
    area = float((density[1:] + density[:-1]).sum() * (x[1] - x[0]) / 2)
    assert area + 0.5 == pytest.approx(p, abs=1e-5)
    assert stats.t_quantile(1 - p, df) == pytest.approx(-t)


requests = st.lists(st.tuples(st.floats(0, 100), st.floats(0.01, 20)), min_size=1, max_size=30)


@given(requests)
def test_shares_of_busy_time_add_up_to_it(found: list[tuple[float, float]]) -> None:
    starts, seconds = np.array(found).T
    shares = busy_shares(starts, starts + seconds)
    union, until = 0.0, -math.inf
    for start, length in sorted(found):
        union += max(0.0, start + length - max(start, until))
        until = max(until, start + length)
    assert shares.sum() == pytest.approx(union)
    assert (shares <= seconds + 1e-9).all()
    assert (shares > 0).all()


def test_requests_one_at_a_time_have_their_time_for_themselves() -> None:
    starts, seconds = np.array([0.0, 3.0, 10.0]), np.array([2.0, 4.0, 1.0])
    assert busy_shares(starts, starts + seconds) == pytest.approx(seconds)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**31), st.integers(1, VOCABULARY - 1), st.floats(0.01, 3))
def test_kl_from_some_tokens_is_a_lower_bound_and_from_all_exact(
    seed: int, count: int, noise: float
) -> None:
    generator = np.random.default_rng(seed)
    p, q = (generator.normal(0, 2, (5, VOCABULARY)) for _ in "pq")
    q = p + noise * q
    p, q = (x - np.log(np.exp(x).sum(1, keepdims=True)) for x in (p, q))
    targets = generator.integers(0, VOCABULARY, 5).tolist()

    def returned(log: Any, k: int) -> list[dict[int, float]]:
        return [
            {int(i): float(row[i]) for i in {*np.argsort(-row)[:k].tolist(), target}}
            for row, target in zip(log, targets, strict=True)
        ]

    exact = float((np.exp(p) * (p - q)).sum())
    every = (returned(x, VOCABULARY) for x in (p, q))
    whole = compare_logprobs(*every, targets, whole=True)
    some = compare_logprobs(returned(p, count), returned(q, count), targets, whole=False)
    assert whole.kl == pytest.approx(exact)
    assert -1e-6 <= some.kl <= exact + 1e-5
    for score in (whole, some):
        assert score.nll_b == pytest.approx(-float(q[range(5), targets].sum()))
        assert score.top1 == int((p.argmax(1) == q.argmax(1)).sum())
