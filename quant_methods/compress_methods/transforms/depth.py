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
from copy import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from compress_methods.errors import RecipeError
from compress_methods.lazy import torch
from compress_methods.transforms.base import (
    Outline,
    Part,
    Pass,
    check_prunable,
    register_transform,
)

if TYPE_CHECKING:
    from compress_methods.model.skeleton import Skeleton


@register_transform
@dataclass(frozen=True)
class Depth(Pass):
    """`drop`: share of the layers below 1 (never more than asked: 25% of 30 layers are 7), a number
    of layers from 1."""

    drop: float = 0.25
    influence: tuple[float, ...] = field(default=(), init=False, compare=False)
    name: ClassVar[str] = "depth"
    reshapes: ClassVar[bool] = True
    looks_ahead: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_share("drop", self.drop)

    def plan(self, skeleton: Skeleton) -> Outline:
        check_prunable(skeleton.model.config, self.name)
        return Outline(layers=self._left(len(skeleton.blocks)))

    def _left(self, count: int) -> int:
        return count - share_of("depth: drop", self.drop, count)

    def survey(self, part: Part) -> list[float]:
        """1 - mean cosine of what goes in and what comes out."""
        total, count = 0.0, 0
        for before, after in part.batches():
            mean = float(torch.cosine_similarity(before, after, dim=-1).mean())
            total += (1 - mean) * len(before)
            count += len(before)
        return [total / count]

    def decide(self, surveyed: Sequence[Sequence[float]]) -> Depth:
        decided = copy(self)
        object.__setattr__(decided, "influence", tuple(row[0] for row in surveyed))
        return decided

    def layers(self, count: int) -> list[int]:
        scores = self.influence or (0.0,) * count
        ranked = sorted(range(count), key=lambda i: scores[i], reverse=True)
        return sorted(ranked[: self._left(count)])

    def facts(self) -> dict[str, Any]:
        return {"influence": list(self.influence)}


def check_share(key: str, share: float, things: str = "layers") -> None:
    """`RecipeError` unless it is a share of layers, or a number of them."""
    if share < 0 or (share >= 1 and share != int(share)):
        raise RecipeError(
            f"{key} is {share}, expected a share below 1 or a whole number of {things}"
        )


def share_of(what: str, share: float, count: int, things: str = "layers") -> int:
    """How many of `count` layers a share comes to, never more than asked; `RecipeError` names
    `what`."""
    found = int(share if share >= 1 else share * count + 1e-9)
    if found >= count:
        raise RecipeError(f"{what} is {found} {things}, the model has {count}")
    if share and not found:
        raise RecipeError(f"{what} is {share:.1%} of {count} {things}, less than one")
    return found
