"""zero_packing: a checkpoint that has zeros already, packed without loss.

Of every module a recipe's `pack_zeros` names, the nonzeros in every m consecutive columns are
counted; n is the most there are in any block. Of all n:m the one with the fewest stored bytes is
taken, the smallest m among equals, in the dtype of the checkpoint, so every value stays as it is
(the sign of zeros excepted). Modules that vLLM fuses get one n:m between them. A module none of
whose n:m is smaller than its dense tensor is left dense, with a reason.

Reads every weight of these modules once, before the conversion.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from compress_methods.algorithms.rtn import RoundToNearest
from compress_methods.checkpoint.sharding import check_matrix
from compress_methods.checkpoint.source import Source
from compress_methods.errors import FormatError, RecipeError
from compress_methods.formats.dense import DTYPES, Dense
from compress_methods.formats.sparse import BLOCKS, Sparse
from compress_methods.model.architecture import Architecture
from compress_methods.model.skeleton import Skeleton
from compress_methods.model.slot import Slot
from compress_methods.recipe.matching import matches
from compress_methods.recipe.schema import ModuleRule, Recipe
from compress_methods.system.progress import Progress


@dataclass
class Nonzeros:
    """`most[m]`: nonzeros in the fullest m columns of any row, for every m that divides `cols`."""

    cols: int
    weights: int = 0
    nonzeros: int = 0
    most: dict[int, int] = field(default_factory=dict)

    def add(self, rows: Tensor) -> None:
        """Count some rows [n, cols]."""
        counts = rows.ne(0)
        self.weights += rows.numel()
        self.nonzeros += int(counts.sum())
        counts, width = counts.to(torch.int16), 1
        for m in BLOCKS:
            if self.cols % m:
                break
            counts = counts.unflatten(1, (-1, m // width)).sum(-1, dtype=torch.int16)
            width = m
            self.most[m] = max(self.most.get(m, 0), int(counts.max()))

    @property
    def share(self) -> float:
        """Zeros among all weights."""
        return 1 - self.nonzeros / max(1, self.weights)


def pack_zeros(
    recipe: Recipe, skeleton: Skeleton, source: Source, ways: int = 1, *, quiet: bool = False
) -> Recipe:
    """The recipe with formats and rules in place of `pack_zeros`; `unfit` says what stays dense.

    `ways` ranks must be able to share the result. Raises `RecipeError` if nothing fits.
    """
    groups = list(_groups(recipe, skeleton))
    total = sum(source.nbytes_of(slot) for group in groups for slot in group)
    formats: dict[str, Sparse] = {}
    modules: dict[str, list[str]] = {}
    unfit: dict[str, str] = {}
    with Progress(total, "counting zeros", quiet=quiet) as progress:
        for group in groups:
            counted = [count(source, slot) for slot in group]
            fmt = _smallest(group, counted, source, ways, skeleton.architecture)
            for slot, found in zip(group, counted, strict=True):
                progress.step(source.nbytes_of(slot), slot.module)
                if fmt is None:
                    unfit[slot.module] = _reason(found, len(group) > 1)
                else:
                    key = f"{fmt.n}of{fmt.m}-{fmt.values.describe()}"
                    formats[key] = fmt
                    modules.setdefault(key, []).append(slot.module)
    rules = [ModuleRule(tuple(mine), key, RoundToNearest()) for key, mine in modules.items()]
    if not rules and not recipe.modules:
        first, why = next(iter(unfit.items()), ("", "no module matches"))
        raise RecipeError(
            f"recipe {recipe.name!r}: no module of {source.name} has zeros that an n:m holds "
            f"in fewer bytes ({first}: {why})"
        )
    return dataclasses.replace(
        recipe,
        formats={**recipe.formats, **formats},
        modules=(*recipe.modules, *rules),
        pack_zeros=(),
        unfit=unfit,
    )


def count(source: Source, slot: Slot) -> Nonzeros:
    """Read a matrix and count its nonzeros along the columns."""
    found = Nonzeros(slot.cols)
    for _, slab in source.slot_slabs(slot):
        found.add(slab)
    return found


def _groups(recipe: Recipe, skeleton: Skeleton) -> Iterator[list[Slot]]:
    """What `pack_zeros` names and no rule claims: modules that must share a format together."""
    wanted = {
        name: slot
        for name, slot in skeleton.slots.items()
        if matches(recipe.pack_zeros, name, slot.kind)
        and not any(rule.matches(name, slot.kind) for rule in recipe.modules)
    }
    while wanted:
        name = next(iter(wanted))
        parent, _, leaf = name.rpartition(".")
        fused = skeleton.architecture.group(leaf)
        members = [f"{parent}.{other}" if parent else other for other in fused]
        yield [wanted.pop(member) for member in members if member in wanted]


def _smallest(
    group: list[Slot],
    counted: list[Nonzeros],
    source: Source,
    ways: int,
    architecture: Architecture,
) -> Sparse | None:
    """The n:m of fewest bytes that holds all modules of a group; None if dense is no larger."""
    dtypes = {source.entries[source.tensor_of(slot)].dtype for slot in group}
    dtype = dtypes.pop()
    if dtypes or dtype not in DTYPES:
        return None
    best, least = None, sum(source.nbytes_of(slot) for slot in group)
    for m in BLOCKS:
        if not all(m in found.most for found in counted):
            continue
        fmt = Sparse(max(1, *(found.most[m] for found in counted)), m, Dense(dtype))
        try:
            size = sum(fmt.nbytes(slot.rows, slot.cols) for slot in group)
            for slot in group:
                shape = (slot.rows, slot.cols)
                check_matrix(slot.module, slot.kind, shape, fmt, ways, architecture)
        except FormatError:
            continue
        if size < least:
            best, least = fmt, size
    return best


def _reason(found: Nonzeros, fused: bool) -> str:
    m = max(found.most, default=0)
    if not m:
        return f"{found.cols} columns are no multiple of {BLOCKS[0]}"
    full = f"the fullest {m} columns of a row have {found.most[m]} that are not"
    return f"{found.share:.1%} zeros, but {full}" + (
        "; it shares a format with its neighbours" if fused else ""
    )
