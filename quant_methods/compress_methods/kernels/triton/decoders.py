"""How places of a stored matrix become numbers, in Triton: one small decoder for each way to store.

A decoder takes `data` (pointers to its tensors), `row` and `column` (int64 and int32 indices that
broadcast against each other, all inside the matrix), `cols` (columns that are stored) and constants
of the format. It returns float32 values without their scales. They are exact in 16 bits: codes,
entries of tables, small floats and windows of a trellis have 8 significant bits at most. Tables of
floats have more: products with 16-bit activations round them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from compress_methods.formats.trellis import ADDEND, FACTOR, MIDDLE, TILE

_FACTOR, _ADDEND = tl.constexpr(FACTOR), tl.constexpr(ADDEND)
_MIDDLE, _TILE = tl.constexpr(MIDDLE), tl.constexpr(TILE)


@triton.jit
def plane(base, inside, BITS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """What one plane of a block holds of its columns `inside`, see `formats/encoding/codes.py`."""
    width: tl.constexpr = BLOCK * BITS // 8
    byte = tl.load(base + inside % width).to(tl.int32)
    return (byte >> (inside // width * BITS)) & (2**BITS - 1)


@triton.jit
def codes_at(packed, column, BITS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """int32 codes of columns of the rows that `packed` points to."""
    inside = column % BLOCK
    base = packed + column // BLOCK * (BLOCK * BITS // 8)
    if BITS == 3:
        low = plane(base, inside, 2, BLOCK)
        return low | (plane(base + BLOCK // 4, inside, 1, BLOCK) << 2)
    elif BITS == 5 or BITS == 6:
        low = plane(base, inside, 4, BLOCK)
        return low | (plane(base + BLOCK // 2, inside, BITS - 4, BLOCK) << 4)
    else:
        return plane(base, inside, BITS, BLOCK)


@triton.jit
def affine(data, row, column, cols, FORMAT: tl.constexpr):  # type: ignore[no-untyped-def]
    """code - zero. FORMAT: bits, block, columns of a group, twice the zero or -1 where zeros are
    stored: data = (codes, zeros uint8 [rows, groups])."""
    codes = codes_at(data[0] + row * (cols * FORMAT[0] // 8), column, FORMAT[0], FORMAT[1])
    if FORMAT[3] >= 0:
        return codes.to(tl.float32) - FORMAT[3] * 0.5
    else:
        group = cols if FORMAT[2] == 0 else FORMAT[2]
        zeros = tl.load(data[1] + row * (cols // group) + column // group)
        return (codes - zeros.to(tl.int32)).to(tl.float32)


@triton.jit
def table(data, row, column, cols, FORMAT: tl.constexpr):  # type: ignore[no-untyped-def]
    """table[code]. FORMAT: bits, block, rows that share a table, 0 for all: data = (codes, tables
    [tables, 2^bits])."""
    codes = codes_at(data[0] + row * (cols * FORMAT[0] // 8), column, FORMAT[0], FORMAT[1])
    if FORMAT[2] > 0:
        codes += (row // FORMAT[2] * 2 ** FORMAT[0]).to(tl.int32)
    return tl.load(data[1] + codes).to(tl.float32)


@triton.jit
def plain(data, row, column, cols, FORMAT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Values as they are: data = (values [rows, cols],)."""
    return tl.load(data[0] + row * cols + column).to(tl.float32)


@triton.jit
def trellis(data, row, column, cols, FORMAT: tl.constexpr):  # type: ignore[no-untyped-def]
    """c[window], see `formats/trellis.py`. FORMAT: bits, bits of a window: data = (tiles,)."""
    inner = column % _TILE
    # Of a row columns 0, 1, 4, 5, ... come first, then the others.
    place = inner % 2 + inner // 4 * 2 + inner // 2 % 2 * (_TILE // 2)
    bit = (row % _TILE * _TILE + place).to(tl.int32) * FORMAT[0]
    size: tl.constexpr = _TILE * _TILE * FORMAT[0] // 8
    base = data[0] + row // _TILE * (cols // _TILE * size) + column // _TILE * size
    first = bit // 8
    window = tl.load(base + first).to(tl.int32)
    window |= tl.load(base + (first + 1) % size).to(tl.int32) << 8
    window |= tl.load(base + (first + 2) % size).to(tl.int32) << 16
    window = (window >> (bit % 8)) & (2 ** FORMAT[1] - 1)
    digits = window * _FACTOR + _ADDEND
    lower = (digits & 15) + (digits >> 4 & 15)
    upper = (digits >> 8 & 15) + (digits >> 12 & 15)
    return (2 * lower + 3 * upper - _MIDDLE).to(tl.float32)
