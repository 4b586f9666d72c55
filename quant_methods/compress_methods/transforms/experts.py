"""experts: drop the experts of a mixture that add least to what their layer makes.

REAP (Lasby et al., 2025, arXiv:2510.13999): the saliency of expert j is the mean, over the tokens
that the router sends to it, of g_j(x) ||E_j(x)||, its score times the size of its output. The least
salient experts of each layer go, the router loses their rows, and as many as before are chosen for
a token, of fewer. Nothing else is changed, so a plain smaller mixture comes out.

Every layer keeps as many. Where a router chooses groups of experts first, each group keeps as many.
An expert that no token of the text comes to has no saliency and goes first: the text decides what
the model still knows, so it must cover what it will be used for. Fails where fewer would stay than
are chosen for one token. With `merge` what goes is averaged into what stays first (`merging.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from compress_methods.errors import RecipeError
from compress_methods.lazy import torch
from compress_methods.model.experts import LAST, owner_of, watch_outputs
from compress_methods.transforms.base import Outline, Part, Pass, register_transform
from compress_methods.transforms.depth import check_share, share_of
from compress_methods.transforms.merging import merge_experts, require_mergeable

if TYPE_CHECKING:
    from torch import Tensor, nn

    from compress_methods.model.skeleton import Skeleton

COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
CHOSEN = ("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts")
GROUPS, GROUPS_CHOSEN = "n_group", "topk_group"
BEST = 2
"""Experts by which a router judges a group."""


@register_transform
@dataclass(frozen=True)
class Experts(Pass):
    """`drop`: share of each layer's experts below 1 (never more than asked), or a number of them
    from 1; `merge`: what goes is averaged into what stays."""

    drop: float = 0.25
    merge: bool = False
    name: ClassVar[str] = "experts"
    reshapes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_share("drop", self.drop, "experts")

    def plan(self, skeleton: Skeleton) -> Outline:
        config = skeleton.model.config
        if not any(slot.kind == "experts" for slot in skeleton.slots.values()):
            raise RecipeError(f"{self.name}: {config.model_type!r} has no experts that can be told")
        if self.merge:
            require_mergeable(skeleton, self.name)
        count, left = _count(config), self._left(config)
        stated = config.to_dict()  # without other names for the same
        changes = {key: left for key in COUNTS if stated.get(key) == count}
        return Outline(changes, experts=left)

    def _left(self, config: Any) -> int:
        """How many stay in each layer; as many in each group."""
        count, groups = _count(config), _groups(config)
        left = count - share_of(f"{self.name}: drop", self.drop, count, "experts")
        left += -left % groups
        chosen = max(int(getattr(config, key, None) or 0) for key in CHOSEN)
        within = left // groups * int(getattr(config, GROUPS_CHOSEN, None) or groups)
        if within < chosen:
            raise RecipeError(
                f"{self.name}: {left} of {count} experts would stay, but {chosen} are chosen for "
                "every token; drop fewer"
            )
        if groups > 1 and left < BEST * groups:
            raise RecipeError(
                f"{self.name}: {left // groups} would stay in each of {groups} groups, which are "
                f"judged by their best {BEST}; drop fewer"
            )
        if left == count:
            raise RecipeError(
                f"{self.name}: nothing would be dropped of {count} experts in {groups} groups"
            )
        return left

    def visit(self, part: Part) -> None:
        """New values of experts and router; the block in memory becomes smaller, too."""
        left, groups = self._left(part.config), _groups(part.config)
        for owner in dict.fromkeys(owner_of(s) for s in part.slots if s.kind == "experts"):
            salient, tokens = _saliency(part, owner)
            kept = _kept(salient, left, groups)
            if self.merge:
                merge_experts(part, owner, kept, tokens)
            for name, value, axis in _tensors_by_expert(part, owner, len(salient)):
                part.replace(name, value.index_select(axis, kept.to(value.device)))
            _shrink(part, owner, kept, len(salient))
            gone = sorted(set(range(len(salient))) - set(kept.tolist()))
            done = "merged" if self.merge else "dropped"
            part.note(owner, f"experts {', '.join(map(str, gone))} {done}")


def _count(config: Any) -> int:
    """Experts of a layer."""
    return next(int(n) for n in (getattr(config, key, None) for key in COUNTS) if n)


def _groups(config: Any) -> int:
    """Groups of experts that a router chooses first."""
    return int(getattr(config, GROUPS, None) or 1)


def _saliency(part: Part, owner: str) -> tuple[Tensor, Tensor]:
    """Mean score times size of output of every expert [experts], and how many tokens came to it."""
    module = part.skeleton.module(owner)
    total = torch.zeros(len(module.get_parameter(LAST)), dtype=torch.float64)
    tokens = torch.zeros_like(total)

    def add(expert: int, scores: Tensor, outputs: Tensor) -> None:
        total[expert] += float((scores * outputs.norm(dim=-1)).sum())
        tokens[expert] += len(outputs)

    handle = watch_outputs(module, part.skeleton.architecture, add)
    try:
        with torch.no_grad():
            for piece in part.inputs().split(part.batch):
                part.forward(piece)
    finally:
        handle.remove()
    return total / tokens.clamp(min=1), tokens


def _kept(salient: Tensor, left: int, groups: int) -> Tensor:
    """Numbers of the experts that stay, in order: the most salient of each group."""
    by_group = salient.reshape(groups, -1)
    best = by_group.argsort(dim=1, descending=True, stable=True)[:, : left // groups]
    first = torch.arange(groups)[:, None] * by_group.shape[1]
    return (best + first).flatten().sort().values


def _parts_by_expert(part: Part, owner: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a mixture that have something for each expert: experts and router."""
    mixture, _, experts = owner.rpartition(".")
    for name, module in part.skeleton.module(mixture).named_modules():
        first = name.partition(".")[0]
        if first == experts or first in part.skeleton.architecture.routers or not first:
            yield f"{mixture}.{name}".rstrip("."), module


def _tensors_by_expert(part: Part, owner: str, count: int) -> Iterator[tuple[str, Tensor, int]]:
    """Name of a tensor, the tensor, and its axis of experts."""
    for name, module in _parts_by_expert(part, owner):
        for leaf, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None and count in tensor.shape:
                yield f"{name}.{leaf}", tensor.data, tensor.shape.index(count)


def _shrink(part: Part, owner: str, kept: Tensor, count: int) -> None:
    """Have the block in memory compute with the experts that stay."""
    for name, tensor, axis in list(_tensors_by_expert(part, owner, count)):
        place, _, leaf = name.rpartition(".")
        module = part.skeleton.module(place)
        left = tensor.index_select(axis, kept.to(tensor.device))
        if leaf in module._parameters:
            module._parameters[leaf] = torch.nn.Parameter(left, requires_grad=False)
        else:
            module._buffers[leaf] = left
    for _, module in _parts_by_expert(part, owner):
        for key in COUNTS:
            if vars(module).get(key) == count:
                setattr(module, key, len(kept))
