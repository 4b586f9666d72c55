"""Divergence from the likeliest tokens of two servers never exceeds the true one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.vllm_compress.operations.abtest.streaming_server import VOCABULARY
from vllm_compress.operations.abtest.scoring.logprobs import Score, compare_logprobs


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
    assert some.kl <= some.kl_most
    assert whole.kl_most == pytest.approx(whole.kl)
    for score in (whole, some):
        assert score.nll_b == pytest.approx(-float(q[range(5), targets].sum()))
        assert score.top1 == int((p.argmax(1) == q.argmax(1)).sum())


def test_a_token_that_fell_out_of_the_list_counts_as_fallen() -> None:
    """Token 1 is missing at B, whose last token has 0.01: it fell by ln(0.3 / 0.01) at least."""
    a = {0: np.log(0.6), 1: np.log(0.3)}
    b = {0: np.log(0.6), 2: np.log(0.01)}
    found = compare_logprobs([a], [b], [0], whole=False)
    assert found.kl == pytest.approx(0, abs=1e-9)
    assert found.kl_most == pytest.approx(0.4 * np.log(30))


def test_the_upper_bound_holds_for_disturbed_models() -> None:
    """Logits with noise, as compression makes it: of 30 positions the sum is never above it."""
    generator = np.random.default_rng(0)
    for noise in (0.05, 0.2, 0.5, 1.0):
        p = generator.normal(0, 2, (30, VOCABULARY))
        q = p + generator.normal(0, noise, p.shape)
        p, q = (x - np.log(np.exp(x).sum(1, keepdims=True)) for x in (p, q))
        targets = p.argmax(1).tolist()
        lists = [
            [
                {int(i): float(row[i]) for i in np.argsort(-row)[:8]} | {t: float(row[t])}
                for row, t in zip(x, targets, strict=True)
            ]
            for x in (p, q)
        ]
        found = compare_logprobs(*lists, targets, whole=False)
        assert found.kl <= float((np.exp(p) * (p - q)).sum()) <= found.kl_most


def test_a_journal_without_the_upper_bound_knows_none() -> None:
    assert Score(tokens=10, nll_a=1.0, nll_b=1.0, kl=0.01, top1=10).kl_most == np.inf
