"""How far the embeddings of two models lie apart: the cosine between both vectors of a text.

    cosine       e . f / (|e| |f|), averaged over texts
    cosine_p05   what 95% of the texts reach
    1 is the same direction. Texts are windows of a file; a window is one observation.

What counts in use is the order that embeddings give to pairs of texts: `pairs.py`. Fails where the
two models' embeddings have different widths, whose cosine is not defined.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress_methods.evaluation.statistics import mean_per

CONFIDENCE = 0.95


@dataclass(frozen=True)
class EmbeddingEvaluation:
    """Means over `sequences` texts, `intervals` by name as in `metrics.Evaluation`."""

    cosine: float
    cosine_p05: float
    sequences: int
    intervals: dict[str, tuple[float, float]]

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, its keys those of the fields."""
        return {**asdict(self), "intervals": {k: list(v) for k, v in self.intervals.items()}}


def cosine(base: Tensor, other: Tensor) -> float:
    """Of two vectors [hidden]; 0 where one is all zeros."""
    return float(torch.nn.functional.cosine_similarity(base.double(), other.double(), dim=-1))


def summarize_cosines(cosines: Sequence[float]) -> EmbeddingEvaluation:
    """The mean with its 95% interval; `ValueError` without any text."""
    if not cosines:
        raise ValueError("no texts")
    # The tail is that of the distance: its skew is what Hall's correction is for.
    apart = mean_per([1 - value for value in cosines], [1] * len(cosines), CONFIDENCE)
    return EmbeddingEvaluation(
        1 - apart.value,
        float(np.quantile(cosines, 1 - CONFIDENCE)),
        len(cosines),
        {"cosine": (1 - apart.high, min(1.0, 1 - apart.low))},
    )
