"""sharing: neighbouring layers have one set of matrices, stored once and served once.

Models whose layers share weights are trained so (Universal Transformers, Dehghani et al., 2019,
arXiv:1807.03819; MobileLLM, Liu et al., 2024, arXiv:2402.14905), or trained further (Relaxed
Recursive Transformers, Bae et al., 2025, arXiv:2410.20672). Here the layers of a trained model are
cut into runs of neighbours, and each run has the matrices of one of its layers. Which runs, and
which layer of each, is the choice of least sum over layers i of

    d(i, k) = 1 - mean over tokens of cos(block i(x), block i with the matrices of k(x))

measured on the calibration text, k being the layer that i gets the matrices of, at most `reach`
layers away. Norms and biases stay each layer's own. What is packed is shared, so a packing has to
follow in the same sweep, in one format for all layers; packed where the first layer of a run is,
whose inputs an algorithm sees. Weights shrink; KV cache, operations and reading time do not.

Fails where: nothing is trained afterwards. On novels-8m two of eight layers shared lose more than
two dropped (`depth`, which makes everything smaller): a KL of .261 against .219 nats per token.
What could make up for it was tried there, for layers 4 and 5, and is left out: the mean of both
after their neurons are matched (a linear assignment) loses .126 where one of them in place of the
other loses .114; what is left, added back as a product of rank 32, brings that to .091, but the
layer's own weights cut down to that rank lose only .060. Pipeline stages cannot share a layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from compress_methods.errors import RecipeError
from compress_methods.lazy import torch
from compress_methods.transforms.base import Outline, Part, Pass, register_transform
from compress_methods.transforms.depth import check_share, share_of

if TYPE_CHECKING:
    from torch import Tensor

    from compress_methods.model.skeleton import Skeleton
    from compress_methods.model.slot import Slot

SEQUENCES = 8
"""Of the calibration text, spread over all of it, that layers are compared on."""


@register_transform
@dataclass(frozen=True)
class Sharing(Pass):
    """`share`: part of the layers below 1 (never more than asked) or a number of layers from 1 that
    have no matrices of their own. `reach`: how far apart in a run a layer and the one may be whose
    matrices it has."""

    share: float = 0.25
    reach: int = 2
    distances: tuple[tuple[float, ...], ...] = field(default=(), init=False, compare=False)
    name: ClassVar[str] = "sharing"
    looks_ahead: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_share("share", self.share)
        if self.reach < 1:
            raise RecipeError(f"reach is {self.reach}, expected a whole number from 1")

    def check_sweep(self, packs: bool) -> None:
        if not packs:
            raise RecipeError(
                f"{self.name}: shares what is packed, but no packing follows in its sweep; let a "
                "stage of formats and modules come next"
            )

    def plan(self, skeleton: Skeleton) -> Outline:
        if any(slot.kind == "experts" for slot in skeleton.slots.values()):
            raise RecipeError(f"{self.name}: layers of experts cannot share; their routers differ")
        blocks = skeleton.blocks_name
        owners = enumerate(self.owners(len(skeleton.blocks)))
        return Outline(aliases={f"{blocks}.{i}": f"{blocks}.{o}" for i, o in owners if i != o})

    def owners(self, count: int) -> list[int]:
        """The first layer of the run that each is in: it comes before the others."""
        sources = self.sources(count)
        return [sources.index(source) for source in sources]

    def sources(self, count: int) -> list[int]:
        """The layer whose matrices each has; before anything is measured, as many as will be."""
        shared = share_of(f"{self.name}: share", self.share, count)
        least = math.ceil(count / (2 * self.reach + 1))
        if count - shared < least:
            raise RecipeError(
                f"{self.name}: share is {shared} of {count} layers; with a reach of {self.reach} "
                f"at most {count - least} can have those of another"
            )
        found: list[list[float]] = [[math.inf] * count for _ in range(count)]
        for i, row in enumerate(found):
            row[i] = 0.0
            measured = self.distances[i] if self.distances else [0.0] * count
            for other, distance in zip(self._near(i, count), measured, strict=False):
                row[other] = distance
        return divide(found, count - shared)

    def _near(self, index: int, count: int) -> list[int]:
        """Layers that are compared with one, in order."""
        near = range(max(0, index - self.reach), min(count, index + self.reach + 1))
        return [other for other in near if other != index]

    def survey(self, part: Part) -> list[float]:
        """How far the block's outputs turn with the matrices of each layer near it."""
        assert part.index is not None
        inputs = part.inputs()
        inputs = inputs[:: math.ceil(len(inputs) / SEQUENCES)]
        expected = _outputs(part, inputs)
        mine = _matrices(part)
        kept = [part.weight(slot).clone() for slot in mine]
        found = []
        for other in self._near(part.index, len(part.skeleton.blocks)):
            for slot in mine:
                part.weight(slot).copy_(part.original(_like(part, slot, other)))
            pairs = zip(_outputs(part, inputs), expected, strict=True)
            cosines = [torch.cosine_similarity(*pair, dim=-1) for pair in pairs]
            found.append(1 - float(torch.cat(cosines).mean(dtype=torch.float64)))
        for slot, weight in zip(mine, kept, strict=True):
            part.weight(slot).copy_(weight)
        return found

    def decide(self, surveyed: Sequence[Sequence[float]]) -> Sharing:
        decided = copy(self)
        object.__setattr__(decided, "distances", tuple(map(tuple, surveyed)))
        return decided

    def visit(self, part: Part) -> None:
        """The first layer of a run gets the matrices that all of it will have."""
        if part.index is None or part.index < 0:
            return
        source = self.sources(len(part.skeleton.blocks))[part.index]
        if source == part.index or self.owners(len(part.skeleton.blocks))[part.index] != part.index:
            return
        for slot in _matrices(part):
            values = part.original(_like(part, slot, source))
            part.replace(slot.parameter, values.T if slot.transposed else values)

    def facts(self) -> dict[str, Any]:
        if not self.distances:
            return {}
        count = len(self.distances)
        return {"sources": self.sources(count), "distances": [list(row) for row in self.distances]}


def divide(distances: Sequence[Sequence[float]], runs: int) -> list[int]:
    """For each layer the one whose matrices it gets, where layers are cut into so many runs of
    neighbours that have one layer's each: of all ways that of least sum. `distances` [layer, other]
    are 0 where both are the same and infinite where one cannot have those of the other."""
    count = len(distances)
    best: list[tuple[float, list[int]]] = [(0.0, []), *[(math.inf, [])] * count]
    for _ in range(runs):
        longer: list[tuple[float, list[int]]] = [(math.inf, [])] * (count + 1)
        for end in range(1, count + 1):
            for start in range(end - 1, -1, -1):
                loss, source = min(
                    (sum(distances[i][k] for i in range(start, end)), k) for k in range(start, end)
                )
                if math.isinf(loss):
                    break  # and longer runs no less
                total = best[start][0] + loss
                if total < longer[end][0]:
                    longer[end] = (total, [*best[start][1], *[source] * (end - start)])
        best = longer
    return best[count][1]


def _matrices(part: Part) -> list[Slot]:
    """What of a block is shared."""
    return [slot for slot in part.slots if slot.kind == "blocks"]


def _like(part: Part, slot: Slot, layer: int) -> Slot:
    """The same matrix of another layer."""
    blocks = part.skeleton.blocks_name
    tail = slot.module.removeprefix(f"{blocks}.{part.index}")
    return part.skeleton.slots[f"{blocks}.{layer}{tail}"]


def _outputs(part: Part, inputs: Tensor) -> list[Tensor]:
    """What the block makes of states, a batch at a time."""
    with torch.no_grad():
        return [part.forward(piece).float() for piece in inputs.split(part.batch)]
