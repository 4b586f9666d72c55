"""depth: drop the decoder layers that change their input least.

ShortGPT (Men et al., 2024, arXiv:2403.03853): the influence of a block is 1 - mean over tokens of
cos(x, block(x)), measured in one pass over the calibration text through the whole model; the blocks
of least influence go, all at once. What stays is not changed, so the result is exact where a
dropped block did nothing. KV cache, latency and weights shrink in the same proportion.

As a start for training, layers can stay by their place instead: evenly spread, the first and the
last among them (DistilBERT: Sanh et al., 2019, arXiv:1910.01108), or those of both ends (TF-LLMD:
Jha et al., 2023, arXiv:2305.14864); or those that are listed.

Fails where: influence says nothing about what later layers make of a difference; small models,
whose layers all matter, lose much more than large ones. Measure.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from compress_methods.errors import RecipeError, nearest
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

INFLUENCE, EVENLY, ENDS = CHOICES = ("influence", "evenly", "ends")


@register_transform
@dataclass(frozen=True)
class Depth(Pass):
    """`drop`: share of the layers below 1 (never more than asked: 25% of 30 layers are 7), a number
    of layers from 1. `choose`: which stay. `keep`: their numbers, instead of both."""

    drop: float = 0.25
    choose: str = INFLUENCE
    keep: Sequence[int] = ()
    influence: tuple[float, ...] = field(default=(), init=False, compare=False)
    name: ClassVar[str] = "depth"
    reshapes: ClassVar[bool] = True
    looks_ahead: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_share("drop", self.drop)
        if self.choose not in CHOICES:
            near = nearest(self.choose, CHOICES)
            raise RecipeError(f"unknown choose {self.choose!r:.80}; {near}")
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in self.keep) or any(
            later <= sooner for sooner, later in itertools.pairwise([-1, *self.keep])
        ):
            found = list(self.keep)
            raise RecipeError(f"keep is {found!r:.80}, expected numbers from 0, ascending")

    def plan(self, skeleton: Skeleton) -> Outline:
        check_prunable(skeleton.model.config, self.name)
        return Outline(layers=self._left(len(skeleton.blocks)))

    def _left(self, count: int) -> int:
        if self.keep:
            if self.keep[-1] >= count:
                raise RecipeError(
                    f"depth: keep names layer {self.keep[-1]}, the model has 0 to {count - 1}"
                )
            return len(self.keep)
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
        left = self._left(count)
        if self.keep:
            return list(self.keep)
        if self.choose == EVENLY:
            return [round(i * (count - 1) / max(1, left - 1)) for i in range(left)]
        if self.choose == ENDS:
            return [i for i in range(count) if not (left + 1) // 2 <= i < count - left // 2]
        scores = self.influence or (0.0,) * count
        ranked = sorted(range(count), key=lambda i: scores[i], reverse=True)
        return sorted(ranked[:left])

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
