"""depth: drop the decoder layers that change their input least.

ShortGPT (Men et al., 2024, arXiv:2403.03853): the influence of a block is 1 - mean over tokens of
cos(x, block(x)), measured in one pass over the calibration text through the whole model; the blocks
of least influence go, all at once. What stays is not changed, so the result is exact where a
dropped block did nothing. KV cache, latency and weights shrink in the same proportion.

Fails where: influence says nothing about what later layers make of a difference; small models,
whose layers all matter, lose much more than large ones. Measure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from compress_methods.errors import RecipeError
from compress_methods.transforms.base import Transform, check_family, register_transform


@register_transform
@dataclass(frozen=True)
class Depth(Transform):
    """`drop`: share of the layers below 1 (never more than asked: 25% of 30 layers are 7), a number
    of layers from 1."""

    drop: float = 0.25
    name: ClassVar[str] = "depth"
    scores_blocks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.drop < 0 or (self.drop >= 1 and self.drop != int(self.drop)):
            raise RecipeError(
                f"drop is {self.drop}, expected a share below 1 or a whole number of layers"
            )

    def changes(self, config: Any) -> dict[str, Any]:
        check_family(config, self.name)
        return {}

    def layers_left(self, count: int) -> int:
        dropped = int(self.drop if self.drop >= 1 else self.drop * count + 1e-9)
        if dropped >= count:
            raise RecipeError(f"depth: drop is {dropped} layers, the model has {count}")
        if self.drop and not dropped:
            raise RecipeError(f"depth: drop is {self.drop:.1%} of {count} layers, less than one")
        return count - dropped

    def score(self, before: Tensor, after: Tensor) -> float:
        return 1 - float(torch.cosine_similarity(before, after, dim=-1).mean())

    def choose(self, scores: Sequence[float]) -> list[int]:
        ranked = sorted(range(len(scores)), key=lambda i: scores[i], reverse=True)
        return sorted(ranked[: self.layers_left(len(scores))])
