"""What a draft is worth: tokens a step, tokens ahead by the number of requests, and the time."""

from __future__ import annotations

import numpy as np
import pytest

from compress_methods.errors import CompressError
from vllm_compress.operations.capacity.throughput.performance import Curve, MeasuredStep, Windows
from vllm_compress.operations.capacity.throughput.speculation import (
    SpeculativeStep,
    best_ahead,
    read_schedule,
    speculate,
    step_seconds,
    tokens_per_step,
    written,
)


def step(read: float, product: float) -> MeasuredStep:
    """Seconds of reading weights, and of the product of each token."""
    curve = Curve(((1.0, max(read, product)), (1000.0, max(read, 1000 * product))))
    if read > product:
        curve = Curve(((1.0, read), (read / product, read), (1000.0, 1000 * product)))
    return MeasuredStep(Windows(((1, None),)), curve, Curve(((1.0, 0.0),)), 1e-6, 1e-8, 0.01)


TARGET, DRAFT = step(0.1, 0.005), step(0.02, 0.005)


def test_expected_tokens_are_those_of_guesses_that_fail_at_random() -> None:
    draw = np.random.default_rng(0)
    for acceptance, ahead in ((0.3, 2), (0.8, 4)):
        right = draw.random((200_000, ahead)) < acceptance
        said = 1 + np.cumprod(right, axis=1).sum(1).mean()
        assert tokens_per_step(acceptance, ahead) == pytest.approx(said, rel=0.01)
    assert tokens_per_step(1.0, 3) == 4


def test_better_and_cheaper_drafts_write_further_ahead() -> None:
    def best(acceptance: float, cost: float) -> int:
        return best_ahead(acceptance, lambda ahead: 1 + ahead * cost)

    assert best(0.94, 0.25) > best(0.7, 0.25) > best(0.7, 0.9)
    assert best(0.1, 0.9) == 1


def test_more_requests_at_once_are_drafted_for_less_and_at_last_not_at_all() -> None:
    made = speculate(TARGET, DRAFT, 0.8, 128, 100)
    counts = [ahead for _, ahead in made.schedule]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > 2
    assert counts[-1] == 0
    for requests in (1, 8, 64):  # no other number of tokens ahead is faster
        read = 100.0 * requests
        each = [
            step_seconds(TARGET, DRAFT, k, requests, read) / tokens_per_step(0.8, k)
            for k in range(9)
        ]
        assert made.ahead(requests) == each.index(min(each))
        assert made.seconds(requests, requests, read, 0.0) == pytest.approx(min(each))


def test_prompts_take_the_time_they_take_without_a_draft_of_their_own() -> None:
    """Over all steps of a request the sum is that of real steps: what prompts add is not shared."""
    made = SpeculativeStep(TARGET, DRAFT, 0.75, ((1, 3),))
    decode = made.seconds(4, 4, 400.0, 0.0)
    mixed = made.seconds(4 + 200, 4, 400.0, 10_000.0)
    whole = step_seconds(TARGET, DRAFT, 3, 4, 400.0)
    both = step_seconds(TARGET, DRAFT, 3, 4, 400.0, (200, 10_000.0))
    tokens = tokens_per_step(0.75, 3)
    assert mixed + (tokens - 1) * decode == pytest.approx(both)
    assert decode * tokens == pytest.approx(whole)
    # A draft never takes part for nothing: it reads prompts too.
    assert made.seconds(200, 0, 0.0, 0.0) > TARGET.seconds(200, 0, 0.0, 0.0)


def test_a_schedule_is_read_as_it_is_written() -> None:
    for text in ("5", "5,8:2,32:0"):
        assert written(read_schedule(text, "x")) == text
    for wrong in ("", "0", "x", "5,8", "1:5", "5,8:2,8:1", "-1", "0,2:0"):
        with pytest.raises(CompressError, match=r"x is .*, expected tokens such as 5"):
            read_schedule(wrong, "x")
