"""Distances between the predictions of two models, summed over tokens.

At one position, p are the original's probabilities and q the other model's:

    kl            KL(p || q), in nats
    acceptance    sum of min(p, q) = 1 - total variation: the share of tokens that speculative
                  sampling accepts when the other model drafts for the original (Leviathan et al.,
                  2023)
    margin_ratio  (log q(a) - log q(b)) / (log p(a) - log p(b)), a and b being the two tokens the
                  original finds likeliest, a the first: how much of its decision is left. 1 is all
                  of it, 0 a toss of a coin, less than 0 the other way round. The median over
                  positions, those left out where p(a) = p(b)

Logits are compared in float32 whatever the models computed in, a few rows at a time, so that a
vocabulary of 128k needs no more memory than one of 4k; 4 bytes a token are kept for the median.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress_methods.evaluation.statistics import (
    Estimate,
    bounded_mean,
    exp_mean_per,
    mean_between,
    mean_per,
    median_of,
)

CHUNK_BYTES = 32 * 2**20
CONFIDENCE = 0.95
EXACT, LOWER_BOUND = "exact", "lower_bound"


@dataclass(frozen=True)
class Evaluation:
    """Means over `tokens` predicted tokens of `sequences`, `margin_ratio` the median.

    `perplexity_increase` is perplexity / base_perplexity - 1. `kl_kind` is `exact`, or
    `lower_bound` where only part of the vocabulary could be compared: then KL lies between `kl` and
    `kl_most`, as far as `served` can tell, `acceptance` is the least it is, and `margin_ratio` is
    not known. `intervals` holds the 95% confidence interval (low, high) of every mean by its name,
    each sequence being one observation; None where sequences were not told apart.
    """

    perplexity: float
    base_perplexity: float
    perplexity_increase: float
    kl: float
    top1_agreement: float
    acceptance: float
    margin_ratio: float | None
    tokens: int
    sequences: int = 1
    intervals: Mapping[str, tuple[float, float]] | None = None
    kl_kind: str = EXACT
    kl_most: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, its keys those of the fields; a value that is not finite becomes None."""
        found = {key: _json(value) for key, value in asdict(self).items()}
        if self.intervals is not None:
            found["intervals"] = {
                name: [_json(end) for end in ends] for name, ends in self.intervals.items()
            }
        return found


@dataclass(frozen=True)
class Sums:
    """Totals over `tokens` predicted tokens; add those of several batches, then `result()`.

    `nll`, `base_nll` and `kl` are in nats, `top1` counts positions where both models agree,
    `shared` sums min(p, q); where `kl` is a lower bound, `kl_most` is the upper one. `margins` are
    the margin ratios [n] of the positions that have one, in pieces.
    """

    nll: float = 0.0
    base_nll: float = 0.0
    kl: float = 0.0
    top1: int = 0
    tokens: int = 0
    kl_most: float = 0.0
    shared: float = 0.0
    margins: tuple[Tensor, ...] = field(default=(), repr=False, compare=False)

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            self.nll + other.nll,
            self.base_nll + other.base_nll,
            self.kl + other.kl,
            self.top1 + other.top1,
            self.tokens + other.tokens,
            self.kl_most + other.kl_most,
            self.shared + other.shared,
            self.margins + other.margins,
        )

    def result(self, kl_kind: str = EXACT) -> Evaluation:
        """Means of the totals; raises `ValueError` without any token."""
        if not self.tokens:
            raise ValueError("no predicted tokens")
        kl = self.kl / self.tokens if math.isnan(self.kl) else max(0.0, self.kl / self.tokens)
        ratios = self.ratios()
        return Evaluation(
            perplexity=_exp(self.nll / self.tokens),
            base_perplexity=_exp(self.base_nll / self.tokens),
            perplexity_increase=_exp((self.nll - self.base_nll) / self.tokens) - 1,
            kl=kl,
            top1_agreement=self.top1 / self.tokens,
            acceptance=self.shared / self.tokens,
            margin_ratio=float(np.median(ratios)) if len(ratios) else None,
            tokens=self.tokens,
            kl_kind=kl_kind,
            kl_most=kl if kl_kind == EXACT else max(kl, self.kl_most / self.tokens),
        )

    def ratios(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        """All margin ratios [n]."""
        pieces = [piece.numpy() for piece in self.margins]
        return np.concatenate(pieces) if pieces else np.empty(0, np.float32)


def summarize(sequences: Sequence[Sums], kl_kind: str = EXACT) -> Evaluation:
    """Means over all sequences, with 95% intervals by sequence; `ValueError` without any token.

    The intervals speak of other text of which these sequences are a random sample. Sequences cut
    from one document are more alike than those of several, so they say less than as many of those.
    """
    seen = [sums for sums in sequences if sums.tokens]
    with np.errstate(all="ignore"):  # what is not finite stays so, and becomes null
        return _summarize(seen, kl_kind)


def _summarize(seen: Sequence[Sums], kl_kind: str) -> Evaluation:
    margins = tuple(piece for sums in seen for piece in sums.margins)
    plain = (replace(sums, margins=()) for sums in seen)
    whole = replace(sum(plain, Sums()), margins=margins).result(kl_kind)
    tokens = [sums.tokens for sums in seen]
    kl = mean_per([sums.kl for sums in seen], tokens, CONFIDENCE)
    if kl_kind != EXACT:
        both = ([sums.kl for sums in seen], [sums.kl_most for sums in seen])
        kl = mean_between(*both, tokens, CONFIDENCE)
    worse = [sums.nll - sums.base_nll for sums in seen]
    estimates: dict[str, Estimate] = {
        "perplexity": exp_mean_per([sums.nll for sums in seen], tokens, CONFIDENCE),
        "base_perplexity": exp_mean_per([sums.base_nll for sums in seen], tokens, CONFIDENCE),
        "perplexity_increase": exp_mean_per(worse, tokens, CONFIDENCE),
        "kl": kl,
        "top1_agreement": agreement([sums.top1 for sums in seen], tokens),
    }
    if whole.margin_ratio is not None:
        estimates["margin_ratio"] = median_of([sums.ratios() for sums in seen], CONFIDENCE)
    intervals = {name: (found.low, found.high) for name, found in estimates.items()}
    low, high = intervals["perplexity_increase"]
    intervals["perplexity_increase"] = (low - 1, high - 1)
    low, high = intervals["kl"]
    intervals["kl"] = (0.0 if low < 0 else low, high)
    apart = mean_per(
        [n - sums.shared for n, sums in zip(tokens, seen, strict=True)], tokens, CONFIDENCE
    )
    intervals["acceptance"] = (1 - apart.high, min(1.0, 1 - apart.low))
    return replace(whole, sequences=len(seen), intervals=intervals)


def agreement(counts: Sequence[int], tokens: Sequence[int]) -> Estimate:
    """Share of all tokens; one sequence is no sample of others."""
    shares = [count / n for count, n in zip(counts, tokens, strict=True)]
    found = bounded_mean(shares, CONFIDENCE, tokens)
    return found if len(tokens) > 1 else replace(found, low=0.0, high=1.0)


def _json(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 or math.isnan(nats) else math.inf


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood in nats, float32 [n], of `targets` [n] under `logits` [n, vocab]."""
    parts = [_nll(logits[i:j].float(), targets[i:j]) for i, j in _chunks(logits)]
    return torch.cat(parts) if parts else logits.new_zeros(0, dtype=torch.float32)


def token_kl(base_logits: Tensor, logits: Tensor) -> Tensor:
    """KL(base || other) in nats, float32 [n], of the distributions of two logits [n, vocab]."""
    _same_shape(base_logits, logits)
    pairs = ((base_logits[i:j], logits[i:j]) for i, j in _chunks(logits))
    parts = [_kl(b.float().log_softmax(-1), o.float().log_softmax(-1)) for b, o in pairs]
    return torch.cat(parts) if parts else logits.new_zeros(0, dtype=torch.float32)


def compare_logits(base: Tensor, other: Tensor, targets: Tensor) -> Sums:
    """Totals for `base` and `other` logits [n, vocab], any float dtype, and true tokens [n].

    Position i of the logits predicts `targets[i]`: shift before the call. Raises `ValueError` on
    shapes that differ.
    """
    _same_shape(base, other)
    sums = Sums()
    for i, j in _chunks(base):
        t = targets[i:j]
        log_p, log_q = (logits[i:j].float().log_softmax(-1) for logits in (base, other))
        nll, base_nll = (-log.gather(-1, t[:, None]) for log in (log_q, log_p))
        sums += Sums(
            nll=nll.double().sum().item(),
            base_nll=base_nll.double().sum().item(),
            kl=_kl(log_p, log_q).double().sum().item(),
            top1=int((base[i:j].argmax(-1) == other[i:j].argmax(-1)).sum()),
            tokens=j - i,
            shared=torch.minimum(log_p, log_q).exp().sum(-1).double().sum().item(),
            margins=(margin_ratios(log_p, log_q),),
        )
    return sums


def compare_predictions(base: Tensor, other: Tensor, tokens: Tensor, shift: bool) -> Sums:
    """Totals for logits [n, vocab] of both models at all positions of `tokens` [n]; with `shift`
    a position is judged by the next token, without by its own."""
    if shift:
        return compare_logits(base[:-1], other[:-1], tokens[1:])
    return compare_logits(base, other, tokens)


def _nll(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none")


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    terms = log_p.exp() * (log_p - log_q)
    return terms.masked_fill_(log_p == -math.inf, 0).sum(-1)


def margin_ratios(log_p: Tensor, log_q: Tensor) -> Tensor:
    """float32 [m] of the m <= n positions of log-probabilities (or logits) [n, vocab] where the
    original prefers one token; defined at the top."""
    if log_p.shape[-1] < 2:
        return log_p.new_empty(0)
    values, tokens = log_p.topk(2, dim=-1)
    margins = values[:, 0] - values[:, 1]
    left = log_q.gather(-1, tokens)
    ratios = (left[:, 0] - left[:, 1]) / margins
    decided = margins.isfinite() & (margins > 0)
    return ratios[decided | margins.isnan()].float().cpu()


def _chunks(logits: Tensor) -> Iterator[tuple[int, int]]:
    """[first, last) row ranges whose float32 logits take at most `CHUNK_BYTES`."""
    rows = max(1, CHUNK_BYTES // (4 * max(1, logits.shape[-1])))
    for first in range(0, len(logits), rows):
        yield first, min(first + rows, len(logits))


def _same_shape(base: Tensor, other: Tensor) -> None:
    if base.shape != other.shape:
        raise ValueError(f"logits are {list(base.shape)} and {list(other.shape)}, expected equal")
