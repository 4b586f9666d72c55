"""Products with stored matrices on a GPU: one skeleton, whatever the format, in Triton.

Up to `FEW` tokens reading weights takes the time. A program multiplies a tile of rows with its
share of the columns; shares are added by a second launch, in order, so that results do not depend
on who comes first. More tokens want tensor cores busy: rows are decoded into 16 bits, as many at a
time as `SLAB_ELEMENTS` says, and torch multiplies. Nothing waits for the device and no size depends
on values, so CUDA graphs record it.

`data` are a decoder's tensors (`decoders.py`), with `mask` where n of every m columns are stored.
Scales multiply the sums of a tile whose columns share them, so what is multiplied is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from compress_methods.kernels.triton import decoders

FEW = 128
"""Tokens up to which tiles are decoded for a product, not kept."""
MOST_TOKENS, ROWS = 64, 32
"""Of a tile."""
LEAST = 16
"""What tensor cores want of every side of a tile."""
SLAB_ELEMENTS = 2**26
PROGRAMS_PER_PROCESSOR = 4
PROCESSORS_ASSUMED = 4
"""Where there are none: in the interpreter."""


@dataclass(frozen=True)
class Layout:
    """How a matrix lies: the decoder's name and constants, n and m (0 where all columns are
    stored), columns that share a scale (0: all of a row), columns of a tile."""

    decoder: str
    constants: tuple[int, ...]
    n: int
    m: int
    group: int
    step: int


@triton.jit
def tile(  # type: ignore[no-untyped-def]
    data,
    mask,
    scales,
    row,
    column,
    cols,
    DECODE: tl.constexpr,
    FORMAT: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    GROUP: tl.constexpr,
):
    """float32 values of rows [BN] and columns [BK], inside the matrix. Of sparse matrices scaled,
    if groups are less than a row: they end where a row's own columns do."""
    if N == 0:
        return DECODE(data, row[:, None], column[None, :], cols, FORMAT)
    else:
        byte = tl.load(mask + row[:, None] * (cols // 8) + column[None, :] // 8).to(tl.int32)
        there = (byte >> (column % 8)[None, :]) & 1
        size: tl.constexpr = column.shape[0]
        blocks = tl.reshape(there, [row.shape[0], size // M, M])
        before = tl.reshape(tl.cumsum(blocks, 2), [row.shape[0], size]) - there
        kept = cols // M * N
        # A block that lies beyond the last column counts nothing that is stored.
        place = tl.minimum((column // M * N)[None, :] + before, kept - 1)
        values = DECODE(data, row[:, None], place, kept, FORMAT)
        if GROUP > 0:
            values *= tl.load(scales + row[:, None] * (kept // GROUP) + place // GROUP)
        return tl.where(there == 1, values, 0.0)


@triton.jit
def scale_of(scales, row, first, cols, N: tl.constexpr, GROUP: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32 [BN]: what the values of a tile that begins at column `first` are multiplied by."""
    if GROUP == 0:
        return tl.load(scales + row).to(tl.float32)
    elif N > 0:
        return tl.full(row.shape, 1.0, tl.float32)  # done in the tile
    else:
        return tl.load(scales + row * (cols // GROUP) + first // GROUP).to(tl.float32)


@triton.jit
def multiply_tiles(  # type: ignore[no-untyped-def]
    x,
    out,
    data,
    mask,
    scales,
    left,
    inner,
    tokens,
    rows,
    cols,
    steps,
    DECODE: tl.constexpr,
    FORMAT: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    GROUP: tl.constexpr,
    SCALED: tl.constexpr,
    RANK: tl.constexpr,
    WIDE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Share `program_id(1)` of out [shares, tokens, rows]: `steps` tiles of columns each. The first
    share has what `left` [RANK, rows] makes of `inner` [tokens, RANK]; WIDE: RANK, padded."""
    token = tl.program_id(2) * BM + tl.arange(0, BM)
    place = tl.program_id(0) * BN + tl.arange(0, BN)
    row = tl.minimum(place, rows - 1).to(tl.int64)
    share = tl.program_id(1)
    sums = tl.zeros([BM, BN], tl.float32)
    for step in range(share * steps, tl.minimum((share + 1) * steps, tl.cdiv(cols, BK))):
        wanted = step * BK + tl.arange(0, BK)
        column = tl.minimum(wanted, cols - 1)
        values = tile(data, mask, scales, row, column, cols, DECODE, FORMAT, N, M, GROUP)
        inside = (token < tokens)[:, None] & (wanted < cols)[None, :]
        where = x + token.to(tl.int64)[:, None] * cols + column[None, :]
        given = tl.load(where, mask=inside, other=0.0)
        part = tl.dot(given, tl.trans(values.to(given.dtype)), input_precision="ieee")
        if SCALED:
            part *= scale_of(scales, row, step * BK, cols, N, GROUP)[None, :]
        sums += part
    if RANK > 0:
        rank = tl.arange(0, WIDE)
        first = rank < tl.where(share == 0, RANK, 0)
        given = tl.load(
            inner + token[:, None] * RANK + rank[None, :],
            mask=first[None, :] & (token < tokens)[:, None],
            other=0.0,
        )
        factor = tl.load(left + rank[:, None] * rows + row[None, :], mask=first[:, None], other=0.0)
        sums += tl.dot(given, factor, input_precision="ieee")
    where = out + (share * tokens + token).to(tl.int64)[:, None] * rows + place[None, :]
    tl.store(where, sums, mask=(token < tokens)[:, None] & (place < rows)[None, :])


@triton.jit
def add_shares(  # type: ignore[no-untyped-def]
    shares, bias, out, size, rows, COUNT: tl.constexpr, BIASED: tl.constexpr, BLOCK: tl.constexpr
):
    """out [size] = the sum of shares [COUNT, size], and bias [rows] in each row."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    sums = tl.zeros([BLOCK], tl.float32)
    for share in range(COUNT):
        sums += tl.load(shares + share * size + place, mask=inside, other=0.0)
    if BIASED:
        sums += tl.load(bias + place % rows, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, sums.to(out.dtype.element_ty), mask=inside)


@triton.jit
def decode_tiles(  # type: ignore[no-untyped-def]
    out,
    data,
    mask,
    scales,
    ids,
    count,
    first,
    cols,
    DECODE: tl.constexpr,
    FORMAT: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    GROUP: tl.constexpr,
    SCALED: tl.constexpr,
    INDEXED: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """out [count, cols]: rows `ids` [count] if INDEXED, else those from `first` on."""
    place = tl.program_id(0) * BN + tl.arange(0, BN)
    near = tl.minimum(place, count - 1).to(tl.int64)
    if INDEXED:
        row = tl.load(ids + near).to(tl.int64)
    else:
        row = first + near
    wanted = tl.program_id(1) * BK + tl.arange(0, BK)
    column = tl.minimum(wanted, cols - 1)
    values = tile(data, mask, scales, row, column, cols, DECODE, FORMAT, N, M, GROUP)
    if SCALED:
        values *= scale_of(scales, row, tl.program_id(1) * BK, cols, N, GROUP)[:, None]
    inside = (place < count)[:, None] & (wanted < cols)[None, :]
    where = out + near[:, None] * cols + column[None, :]
    tl.store(where, values.to(out.dtype.element_ty), mask=inside)


@cache
def processors(device: torch.device) -> int:
    """How many of a device compute at once; NVIDIA's and AMD's answer to the name of `cuda`."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).multi_processor_count)
    if device.type == "xpu":
        return int(torch.xpu.get_device_properties(device).gpu_subslice_count)
    return PROCESSORS_ASSUMED


@dataclass(frozen=True)
class Matrix:
    """[rows, cols] on a device: `mask` and `scales` None where there are none."""

    layout: Layout
    rows: int
    cols: int
    data: Sequence[Tensor]
    mask: Tensor | None
    scales: Tensor | None

    def _common(self) -> dict[str, Any]:
        return {
            "data": tuple(self.data),
            "mask": self.mask,
            "scales": self.scales,
            "cols": self.cols,
            "DECODE": getattr(decoders, self.layout.decoder),
            "FORMAT": self.layout.constants,
            "N": self.layout.n,
            "M": self.layout.m,
            "GROUP": self.layout.group,
            "SCALED": self.scales is not None,
            "BN": ROWS,
            "BK": self.layout.step,
        }

    def few(
        self, x: Tensor, bias: Tensor | None, factors: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """x [tokens, cols] -> [tokens, rows]; plus A (B x) of `factors` A [rank, rows] by columns
        and B x [tokens, rank]."""
        x, tokens = x.contiguous(), len(x)
        together = min(MOST_TOKENS, max(LEAST, triton.next_power_of_2(tokens)))
        grid = (-(-self.rows // ROWS), -(-tokens // together))
        tiles = -(-self.cols // self.layout.step)
        wanted = -(-PROGRAMS_PER_PROCESSOR * processors(x.device) // (grid[0] * grid[1]))
        steps = -(-tiles // min(tiles, max(1, wanted)))
        count = -(-tiles // steps)
        shares = torch.empty(count, tokens, self.rows, dtype=torch.float32, device=x.device)
        left, inner = (None, None) if factors is None else (factors[0], factors[1].contiguous())
        rank = 0 if inner is None else inner.shape[1]
        multiply_tiles[grid[0], count, grid[1]](
            x, shares, left=left, inner=inner, tokens=tokens, rows=self.rows, steps=steps,
            RANK=rank, WIDE=max(LEAST, triton.next_power_of_2(rank)), BM=together, **self._common(),
        )  # fmt: skip
        out = torch.empty(tokens, self.rows, dtype=x.dtype, device=x.device)
        size, block = out.numel(), 1024
        add_shares[-(-size // block),](
            shares, bias, out, size, self.rows, COUNT=count, BIASED=bias is not None, BLOCK=block
        )
        return out

    def many(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The same of many tokens, by torch."""
        step = max(1, SLAB_ELEMENTS // self.cols)
        parts = []
        for first in range(0, self.rows, step):
            count = min(step, self.rows - first)
            parts.append(x @ self.decoded(first, count, x.dtype).T)
        out = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        return out if bias is None else (out + bias).to(out.dtype)

    def decoded(self, first: int, count: int, dtype: torch.dtype) -> Tensor:
        """Rows [first, first + count) as they are."""
        return self._decode(None, first, count, dtype)

    def embed(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows `ids` [n] -> [n, cols]."""
        return self._decode(ids.contiguous(), 0, len(ids), dtype)

    def _decode(self, ids: Tensor | None, first: int, count: int, dtype: torch.dtype) -> Tensor:
        device = self.data[0].device
        out = torch.empty(count, self.cols, dtype=dtype, device=device)
        if count:
            grid = (-(-count // ROWS), -(-self.cols // self.layout.step))
            decode_tiles[grid](
                out, ids=ids, count=count, first=first, INDEXED=ids is not None, **self._common()
            )
        return out
