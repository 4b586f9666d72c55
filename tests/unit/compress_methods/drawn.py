"""Formats and matrices that hypothesis draws for the tests of formats and kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st

from compress_methods.formats import Format
from compress_methods.formats.dense import Dense
from compress_methods.formats.floats import BLOCK, FP8, OWN_GROUPS, Float
from compress_methods.formats.integer import MID, Integer
from compress_methods.formats.lookup import BITS, FITTED, FIXED, FIXED_BITS, TABLE_ROWS, Lookup
from compress_methods.formats.sparse import BLOCKS, Sparse
from compress_methods.formats.tensor_train import ROWS, TABLE, TensorTrain
from compress_methods.formats.trellis import TILE, Trellis
from compress_methods.formats.wrappers.lowrank import LowRank
from compress_methods.formats.wrappers.rotated import BLOCKS as ROTATED_BLOCKS
from compress_methods.formats.wrappers.rotated import Rotated
from compress_methods.formats.wrappers.shifted import DTYPES as OFFSET_DTYPES
from compress_methods.formats.wrappers.shifted import Shifted

GROUPS = (-1, 32, 64, 128)
ACTIVATIONS = (None, "int8")
Drawn = tuple[Format, torch.Tensor]


def integers(
    bits: Sequence[int] = (2, 3, 4, 5, 6, 8),
    groups: Sequence[int] = GROUPS,
    symmetric: Sequence[bool] = (True, False),
    activations: Sequence[str | None] = ACTIVATIONS,
) -> st.SearchStrategy[Integer]:
    """Integer formats of these parameters."""
    choices = map(st.sampled_from, (bits, groups, symmetric, activations))
    return st.builds(Integer, *choices)


@st.composite
def sparse(draw: st.DrawFn, values: st.SearchStrategy[Any]) -> Sparse:
    """n of m of drawn values; of integers a half or a quarter, so that groups fit few columns."""
    kept, m = draw(values), draw(st.sampled_from(BLOCKS))
    n = draw(st.integers(1, m)) if isinstance(kept, Dense) else m // draw(st.sampled_from((2, 4)))
    return Sparse(n, m, kept)


def mid_integers() -> st.SearchStrategy[Integer]:
    """Those whose zeros lie between two codes."""
    return integers(bits=(2, 3, 4), symmetric=(True,)).map(lambda fmt: replace(fmt, levels=MID))


@st.composite
def lookups(
    draw: st.DrawFn, bits: Sequence[int] = BITS, table_rows: Sequence[int] = TABLE_ROWS
) -> Lookup:
    """Tables of every kind."""
    table = draw(st.sampled_from((*FITTED, *FIXED)))
    size = FIXED_BITS if table in FIXED else draw(st.sampled_from(bits))
    group, rows = draw(st.sampled_from(GROUPS)), draw(st.sampled_from(table_rows))
    return Lookup(size, group, table, rows, draw(st.sampled_from(("bfloat16", "float32"))))


def trellises(
    bits: Sequence[int] = (2, 3, 4), state_bits: Sequence[int] = (8, 9)
) -> st.SearchStrategy[Trellis]:
    """Trellises with few states, over which paths are found soon."""
    return st.builds(Trellis, *map(st.sampled_from, (bits, state_bits, GROUPS)))


@st.composite
def floats(draw: st.DrawFn, kinds: Sequence[str] = tuple(OWN_GROUPS)) -> Float:
    """Floats of 4 and 8 bits; those of 8 in groups and blocks, too."""
    kind = draw(st.sampled_from(kinds))
    if kind != FP8:
        return Float(kind)
    activations = draw(st.sampled_from((None, FP8)))
    if draw(st.booleans()):
        return Float(kind, BLOCK, BLOCK, activations)
    return Float(kind, draw(st.sampled_from(GROUPS)), activations=activations)


def rotated(base: st.SearchStrategy[Any]) -> st.SearchStrategy[Rotated]:
    """Matrices in drawn formats, rotated."""
    return st.builds(Rotated, base, st.sampled_from(ROTATED_BLOCKS), st.integers(0, 2))


@st.composite
def lowrank(draw: st.DrawFn, base: st.SearchStrategy[Any]) -> LowRank:
    """A few columns more than a drawn base holds, stored as values or as integers."""
    rank = draw(st.sampled_from((1, 5, 32, 64)))
    factors: Any = st.just(Dense())
    if rank % 32 == 0:
        factors = st.one_of(factors, integers((4, 8), (-1, 32), activations=(None,)))
    return LowRank(rank, draw(base), draw(factors))


def shifted() -> st.SearchStrategy[Shifted]:
    """Symmetric integers whose groups have offsets."""
    base = integers(symmetric=(True,), activations=(None,))
    return st.builds(Shifted, base, st.sampled_from(OFFSET_DTYPES[::2]))


def trains() -> st.SearchStrategy[TensorTrain]:
    """Trains of cores, of every row and of the whole."""
    kinds, dtypes = st.sampled_from((ROWS, TABLE)), st.sampled_from(("bfloat16", "float32"))
    return st.builds(TensorTrain, st.integers(1, 9), kinds, st.integers(2, 4), dtypes)


def columnwise() -> st.SearchStrategy[Format]:
    """Every kind of format that is filled column by column."""
    values = st.one_of(*[integers()] * 9, st.just(Dense()))
    turned = rotated(st.one_of(integers(), lookups(), floats(), trellises()))
    pruned = sparse(st.one_of(values, floats()))
    own = (mid_integers(), lookups(), floats(), trellises())
    return st.one_of(values, pruned, *own, turned)


def formats() -> st.SearchStrategy[Format]:
    """Every kind of format there is."""
    bases = columnwise().filter(lambda fmt: not isinstance(fmt, Dense))
    return st.one_of(*[columnwise()] * 3, lowrank(st.one_of(bases, st.none())), trains(), shifted())


def units(fmt: Format, shape: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns at whose multiples a matrix can be cut: where no tensor is, only whole."""
    specs = fmt.tensors(*shape).values()
    rows, cols = fmt.alignment(*shape)
    return (
        rows if any(spec.rows_axis for spec in specs) else shape[0],
        cols if any(spec.cols_axis for spec in specs) else shape[1],
    )


def least_columns(fmt: Format) -> int:
    """Columns of a matrix that the format can hold come in multiples of this."""
    if isinstance(fmt, Sparse):
        unit = least_columns(fmt.values)
        return math.lcm(8, fmt.m * unit // math.gcd(unit, fmt.n))
    if isinstance(fmt, Float) and fmt.bits == 8:
        return max(1, fmt.group_size)
    if isinstance(fmt, Integer | Lookup | Float):
        return fmt.block
    if isinstance(fmt, Trellis):
        return max(fmt.group_size, TILE)
    if isinstance(fmt, Shifted):
        return least_columns(fmt.base)
    if isinstance(fmt, LowRank):
        return math.lcm(*(least_columns(f) for f in (fmt.base, fmt.factors) if f is not None))
    return 1 if fmt.inner is fmt else least_columns(fmt.inner)


@st.composite
def matrices(
    draw: st.DrawFn, among: st.SearchStrategy[Any] | None = None, row_tile: int = 1
) -> Drawn:
    """A format and a matrix it can hold: odd row counts, zero rows, huge and tiny values."""
    fmt = draw(formats() if among is None else among)
    rows = row_tile * draw(st.integers(1, 70 // row_tile))
    unit = least_columns(fmt)
    cols = unit * draw(st.integers(1, max(1, 384 // unit)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    weight = torch.randn(rows, cols, generator=generator)
    weight *= 10.0 ** draw(st.integers(-12, 12))
    if draw(st.booleans()):
        weight[draw(st.integers(0, rows - 1))] = 0
    return fmt, weight


@st.composite
def pieces(draw: st.DrawFn, size: int, unit: int, start: int = 0) -> tuple[int, int]:
    """A range [first, last) of `size` entries from `start` that is not empty, cut at units."""
    places = [*range(start, start + size, unit), start + size]
    chosen = st.lists(st.sampled_from(places), min_size=2, max_size=2, unique=True)
    first, last = sorted(draw(chosen))
    return first, last
