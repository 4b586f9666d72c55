"""Verdicts err no more often than they say, and needed numbers reach their power."""

from __future__ import annotations

import math

import numpy as np
import pytest

from compress_methods.evaluation import statistics
from tests.unit.compress_methods.evaluation.draws import (
    LEVEL,
    Draw,
    agreement,
    divergence,
    latency,
    losses,
    partial_scores,
    perplexity,
    rate,
    tasks,
    throughput,
)
from vllm_compress.operations.abtest.scoring.judge import (
    INFERIOR,
    LEAST_PAIRS,
    NON_INFERIOR,
    UNDECIDED,
    Judgement,
    Limit,
    decide,
    judge,
    overall,
)


def verdicts(draw: Draw, limit: Limit, times: int = 1500) -> dict[str, float]:
    """Share of every verdict."""
    generator = np.random.default_rng(2)
    found = [decide(draw(generator), limit) for _ in range(times)]
    return {name: found.count(name) / times for name in (NON_INFERIOR, INFERIOR, UNDECIDED)}


@pytest.mark.parametrize(
    ("draw", "limit"),
    [
        (perplexity(40, 1.02), Limit(1.02, "above")),
        (divergence(300, 0.05), Limit(0.05, "above")),
        (latency(60, 1.1), Limit(1.1, "above")),
        (tasks(150, -0.02), Limit(-0.02, "below")),
        (partial_scores(60, -0.0), Limit(0.0, "below")),
        (agreement(100, 0.8), Limit(0.8, "below")),
        *((divergence(n, 0.05, 1.0), Limit(0.05, "above")) for n in (20, 40, 100)),
        *((divergence(n, 0.05, 1.5), Limit(0.05, "above")) for n in (20, 40, 100)),
        *((latency(n, 1.1, 0.6), Limit(1.1, "above")) for n in (20, 40, 100)),
        *((losses(n, 0.02), Limit(-0.02, "below")) for n in (20, 150, 300)),
        (losses(100, 0.1), Limit(-0.1, "below")),
        *((rate(n, p), Limit(p, "below")) for n in (20, 100) for p in (0.95, 0.99)),
    ],
)
def test_a_server_at_its_margin_passes_and_fails_rarely(draw: Draw, limit: Limit) -> None:
    """Either way at most (1 - 0.95) / 2, and two standard errors of this simulation."""
    allowed = 0.025 + 2 * math.sqrt(0.025 * 0.975 / 1500)
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


def test_equal_answers_are_no_proof_that_none_differs() -> None:
    """No difference in n pairs: n has to be large enough to exclude the margin."""
    few, many = (statistics.bounded_difference([1.0] * n, [1.0] * n, LEVEL) for n in (30, 300))
    limit = Limit(-0.02, "below")
    assert judge(few, limit, LEVEL).verdict == UNDECIDED
    assert judge(many, limit, LEVEL).verdict == NON_INFERIOR
    needed = judge(few, limit, LEVEL).needed
    assert needed is not None
    assert 189 < needed < 1000  # where one that sees no difference is sure of the margin
    assert statistics.bounded_mean([1.0] * 30, LEVEL).low < 0.9


def test_a_handful_of_pairs_decides_nothing_and_one_is_survived() -> None:
    same = statistics.mean_log_ratio([1.0] * 5, [1.0] * 5, LEVEL, True)
    assert judge(same, Limit(1.1, "above"), LEVEL) == Judgement(UNDECIDED, LEAST_PAIRS)
    one = statistics.mean_log_ratio([1.0], [2.0], LEVEL, True)
    assert (one.low, one.high) == (0, math.inf)
    assert judge(one, Limit(1.1, "above"), LEVEL).verdict == UNDECIDED
    assert judge(None, Limit(1.1, "above"), LEVEL) == Judgement(UNDECIDED)


def test_at_the_margin_no_number_of_prompts_is_enough() -> None:
    values = 1.1 * np.exp(np.random.default_rng(0).normal(size=50))
    values *= 1.1 / np.exp(np.log(values).mean())
    at = statistics.mean_log_ratio(np.ones(50), values, LEVEL, False)
    assert judge(at, Limit(1.1, "above"), LEVEL) == Judgement(UNDECIDED, None)


def test_the_whole_is_as_good_as_the_worst_metric() -> None:
    good, bad = Judgement(NON_INFERIOR), Judgement(INFERIOR)
    open_, stuck = Judgement(UNDECIDED, 300), Judgement(UNDECIDED)
    assert overall([good, good]) == good
    assert overall([good, open_, bad]) == bad
    assert overall([good, open_, Judgement(UNDECIDED, 50)]) == open_
    assert overall([open_, stuck]) == stuck
    assert overall([]).verdict == UNDECIDED
