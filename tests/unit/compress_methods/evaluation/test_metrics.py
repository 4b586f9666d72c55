"""Acceptance, margins and intervals are what their definitions say."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from compress_methods.evaluation import metrics
from compress_methods.evaluation.metrics import LOWER_BOUND, Sums, compare_logits, summarize
from compress_methods.evaluation.statistics import median_of

pairs = st.integers(0, 2**31).map(
    lambda seed: torch.randn(2, 7, 33, generator=torch.Generator().manual_seed(seed)) * 3
)


def test_acceptance_and_margin_of_a_case_worked_by_hand() -> None:
    base = torch.tensor([[0.5, 0.25, 0.25], [0.6, 0.3, 0.1], [0.6, 0.1, 0.3]]).log()
    other = torch.tensor([[0.25, 0.5, 0.25], [0.4, 0.3, 0.3], [0.6, 0.1, 0.3]]).log()
    found = compare_logits(base, other, torch.tensor([0, 0, 0]))
    assert found.shared == pytest.approx(0.75 + 0.8 + 1)
    assert found.result().acceptance == pytest.approx((0.75 + 0.8 + 1) / 3)
    # log .25/.5 over log .5/.25: the other way round; log 4/3 over log 2; nothing lost.
    expected = [-1, math.log(4 / 3) / math.log(2), 1]
    assert found.ratios().tolist() == pytest.approx(expected, abs=1e-6)
    assert found.result().margin_ratio == pytest.approx(expected[1], abs=1e-6)


@given(pairs)
def test_acceptance_is_one_minus_total_variation(pair: Tensor) -> None:
    base, other = pair
    p, q = base.double().softmax(-1), other.double().softmax(-1)
    expected = (1 - (p - q).abs().sum(-1) / 2).mean().item()
    found = compare_logits(base, other, torch.zeros(7, dtype=torch.int64)).result()
    assert found.acceptance == pytest.approx(expected, abs=1e-5)


def test_logits_made_flatter_keep_that_share_of_every_margin() -> None:
    base = torch.randn(50, 20, generator=torch.Generator().manual_seed(0))
    found = compare_logits(base, 0.3 * base + 5, torch.zeros(50, dtype=torch.int64)).result()
    assert found.margin_ratio == pytest.approx(0.3, abs=1e-4)
    assert found.top1_agreement == 1


def test_positions_that_prefer_no_token_have_no_margin() -> None:
    tied = torch.tensor([[2.0, 2.0, 0.0], [math.log(2), 0.0, -math.inf]])
    found = compare_logits(tied, tied, torch.tensor([0, 0]))
    assert found.ratios().tolist() == [1]
    assert compare_logits(tied[:1], tied[:1], torch.tensor([0])).result().margin_ratio is None
    lost = compare_logits(tied, torch.full((2, 3), math.nan), torch.tensor([0, 0])).result()
    assert lost.to_dict()["margin_ratio"] is None
    assert lost.to_dict()["acceptance"] is None


def test_chunks_change_neither(monkeypatch: pytest.MonkeyPatch) -> None:
    base, other = torch.randn(2, 50, 20, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(50) % 20
    whole = compare_logits(base, other, targets)
    monkeypatch.setattr(metrics, "CHUNK_BYTES", 4 * 20 * 7)
    parts = compare_logits(base, other, targets)
    assert len(parts.margins) > 1
    assert parts.ratios().tolist() == whole.ratios().tolist()
    assert parts.shared == pytest.approx(whole.shared)


def drawn(generator: np.random.Generator, sequences: int) -> list[Sums]:
    """Sequences of 100 tokens that differ from one another."""
    found = []
    for _ in range(sequences):
        level = generator.gamma(8, 1 / 8)
        ratios = generator.normal(0.9 + 0.05 * (level - 1), 0.3, 100)
        found.append(
            Sums(
                nll=310 + 30 * level,
                base_nll=300 + 30 * level - 2 * generator.normal(),
                kl=5 * level,
                top1=int(generator.binomial(100, min(0.99, 0.9 + 0.02 * level))),
                tokens=100,
                shared=100 * (0.95 - 0.02 * level),
                margins=(torch.tensor(ratios, dtype=torch.float32),),
            )
        )
    return found


TRUTH = {
    "perplexity": math.exp(3.4),
    "perplexity_increase": math.exp(0.1) - 1,
    "kl": 0.05,
    "top1_agreement": 0.92,
    "acceptance": 0.93,
    "margin_ratio": 0.9,
}


def test_intervals_hold_the_truth_nineteen_times_in_twenty() -> None:
    generator = np.random.default_rng(0)
    every = [summarize(drawn(generator, 24)).intervals or {} for _ in range(300)]
    for name, truth in TRUTH.items():
        share = np.mean([one[name][0] <= truth <= one[name][1] for one in every])
        # Of 300 draws, 95% are between 91.2 and 98.8; shares may get wider intervals.
        assert share >= 0.912, name


def test_intervals_are_by_sequence_not_by_token() -> None:
    generator = np.random.default_rng(0)
    found = summarize(drawn(generator, 24))
    few, many = found.intervals or {}, summarize(drawn(generator, 2400)).intervals or {}
    for name in TRUTH:
        ratio = (few[name][1] - few[name][0]) / (many[name][1] - many[name][0])
        assert 6 < ratio < 18, name  # about ten
    assert (found.tokens, found.sequences) == (2400, 24)


def test_one_sequence_has_means_and_no_intervals() -> None:
    found = summarize(drawn(np.random.default_rng(0), 1)).to_dict()
    assert found["intervals"]["kl"] == [0, None]
    assert found["intervals"]["margin_ratio"] == [None, None]
    assert found["intervals"]["acceptance"] == [None, 1]
    assert found["intervals"]["top1_agreement"] == [0, 1]
    with pytest.raises(ValueError, match="no predicted tokens"):
        summarize([])


def test_of_two_bounds_the_interval_holds_both() -> None:
    sums = [Sums(kl=k, kl_most=2 * k, tokens=10, shared=9) for k in (1.0, 1.2, 0.9, 1.1)]
    found = summarize(sums, LOWER_BOUND)
    low, high = (found.intervals or {})["kl"]
    assert low < found.kl < (found.kl_most or 0) < high
    assert found.margin_ratio is None
    assert "margin_ratio" not in (found.intervals or {})


def test_what_is_not_finite_is_null_in_intervals_too() -> None:
    sums = [Sums(nll=math.inf, kl=math.nan, tokens=10), Sums(tokens=10)]
    found = summarize(sums).to_dict()
    assert found["perplexity"] is found["kl"] is None
    assert found["intervals"]["kl"] == [None, None]


def test_a_median_of_equal_values_is_certain() -> None:
    found = median_of([np.ones(5), np.ones(3)], 0.95)
    assert (found.low, found.value, found.high) == (1, 1, 1)
