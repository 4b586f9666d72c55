"""How far the labels of two classifiers lie apart, on texts or on each of their tokens.

    kl               mean of KL(original || compressed) of the label probabilities, nats
    top1_agreement   share of decisions that stay the same

With one label (a reranker's score) probabilities are those of the logistic function, a label and
its opposite. The text is one observation, its tokens one cluster of it.

Fails where: models have different labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from compress_methods.evaluation.metrics import CONFIDENCE, Sums, agreement, token_kl
from compress_methods.evaluation.statistics import mean_per


@dataclass(frozen=True)
class ClassEvaluation:
    """Means over `decisions` in `sequences` texts, `intervals` by name as in `Evaluation`."""

    kl: float
    top1_agreement: float
    decisions: int
    sequences: int
    intervals: dict[str, tuple[float, float]]

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, its keys those of the fields."""
        return {**asdict(self), "intervals": {k: list(v) for k, v in self.intervals.items()}}


def compare_classes(base: Tensor, other: Tensor) -> Sums:
    """Totals for logits [labels] of a text or [length, labels] of its tokens; `ValueError` where
    shapes differ."""
    base, other = (logits.reshape(-1, logits.shape[-1]).float() for logits in (base, other))
    if base.shape[-1] == 1:
        base, other = (torch.cat([logits, 0 * logits], -1) for logits in (base, other))
    same = int((base.argmax(-1) == other.argmax(-1)).sum())
    kl = token_kl(base, other).double().sum().item()
    return Sums(kl=kl, top1=same, tokens=len(base))


def summarize_classes(texts: Sequence[Sums]) -> ClassEvaluation:
    """Means over all texts with 95% intervals by text; `ValueError` without any."""
    if not texts:
        raise ValueError("no texts")
    counts = [sums.tokens for sums in texts]
    kl = mean_per([sums.kl for sums in texts], counts, CONFIDENCE)
    same = agreement([sums.top1 for sums in texts], counts)
    return ClassEvaluation(
        max(0.0, kl.value),
        same.value,
        sum(counts),
        len(texts),
        {"kl": (max(0.0, kl.low), kl.high), "top1_agreement": (same.low, same.high)},
    )
