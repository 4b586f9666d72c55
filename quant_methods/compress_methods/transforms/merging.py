"""merging: experts that go are averaged into those that stay.

M-SMoE (Li et al., 2024, arXiv:2310.01334): each expert that goes joins the one that stays whose row
of the router points the same way. Its neurons are put in that one's order, by the permutation P
that makes sum_j f_j . f'_P(j) largest, f_j being neuron j's rows of the first matrices and its
column of the last (weight matching). Then the two are averaged, each counting by how many tokens
came to it:

    E_t <- (n_t E_t + n_d P E_d) / (n_t + n_d)

In the paper rows of the router stay and point to the average; here they go, as a plain smaller
mixture has one for each expert. On the trained mixture of the benchmarks merging loses more than
dropping alone. Needs scipy's assignment, which takes the cube of an expert's channels. Fails where
experts have biases, or routers no row for each.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from compress_methods.errors import RecipeError
from compress_methods.lazy import torch
from compress_methods.model.experts import LAST, is_last, owner_of

if TYPE_CHECKING:
    from torch import Tensor

    from compress_methods.model.skeleton import Skeleton
    from compress_methods.model.slot import Slot
    from compress_methods.transforms.base import Part


def require_mergeable(skeleton: Skeleton, name: str) -> None:
    """`RecipeError` where experts cannot be aligned."""
    owners = {owner_of(s) for s in skeleton.slots.values() if s.kind == "experts"}
    for owner in owners:
        if any(leaf.endswith("bias") for leaf in skeleton.module(owner)._parameters):
            raise RecipeError(f"{name}: merge: the experts of {owner} have biases; leave it out")
        _router(skeleton, owner)


def merge_experts(part: Part, owner: str, kept: Tensor, tokens: Tensor) -> None:
    """Average every expert not in `kept` into one that is, in the block in memory."""
    experts: dict[int, list[Slot]] = defaultdict(list)
    for slot in part.slots:
        if slot.kind == "experts" and owner_of(slot) == owner:
            assert isinstance(slot.index[0], int)
            experts[slot.index[0]].append(slot)
    rows = _router(part.skeleton, owner).float().cpu()
    rows = torch.nn.functional.normalize(rows - rows.mean(0), dim=1)
    counts = tokens.clone()
    for gone in sorted(set(experts) - set(kept.tolist())):
        stays = int(kept[(rows[kept] @ rows[gone]).argmax()])
        share = float(counts[gone] / (counts[gone] + counts[stays]).clamp(min=1))
        counts[stays] += counts[gone]
        order = _order(part, experts[stays], experts[gone])
        for one, other in zip(experts[stays], experts[gone], strict=True):
            axis = 1 if is_last(one) else 0
            part.weight(one).lerp_(part.weight(other).index_select(axis, order), share)


def _order(part: Part, stays: list[Slot], gone: list[Slot]) -> Tensor:
    """For each neuron of the expert that stays, which one of the other is most like it."""
    from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]

    alike = sum(
        _by_neuron(part, one) @ _by_neuron(part, other).T
        for one, other in zip(stays, gone, strict=True)
    )
    assert not isinstance(alike, int)
    _, found = linear_sum_assignment(alike.cpu().numpy(), maximize=True)
    return torch.from_numpy(found).to(alike.device)


def _by_neuron(part: Part, slot: Slot) -> Tensor:
    weight = part.weight(slot)
    return (weight.T if is_last(slot) else weight).float()


def _router(skeleton: Skeleton, owner: str) -> Tensor:
    """[experts, columns] of the router beside a module of experts; `RecipeError` without one."""
    mixture = owner.rpartition(".")[0]
    count = len(skeleton.module(owner).get_parameter(LAST))
    for name, module in skeleton.module(mixture).named_modules():
        weight = module._parameters.get("weight")
        known = name.partition(".")[0] in skeleton.architecture.routers
        if known and weight is not None and weight.dim() == 2 and len(weight) == count:
            return weight.data
    raise RecipeError(f"experts: merge: {mixture} has no router with a row for each expert")
