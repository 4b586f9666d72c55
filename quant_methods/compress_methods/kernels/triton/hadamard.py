"""The Walsh-Hadamard transform of blocks with signs, in Triton. Imports where Triton does.

One program takes some rows of one block. The block is multiplied with the matrix of +1 and -1,
which the program makes of the parities of place numbers: tensor cores do that faster than lanes
exchange sums and differences, and 16-bit inputs with a sign are exact in it. Sums are float32, and
float32 inputs are not rounded to TF32.

Whole blocks take one launch; what a row has left over, in blocks of less, one for each. Blocks of
less than 16 are padded with zeros, as tensor cores want; the matrix of more than 128 would not stay
in a program's registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from compress_methods.formats.wrappers.rotated import blocks_of

ROWS = 16
LEAST = 16


@triton.jit
def turn_block(  # type: ignore[no-untyped-def]
    x,
    out,
    signs,
    rows,
    stride,
    first,
    sign,
    BACK: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """ROWS rows of a block of SIZE columns, padded to WIDTH; the first block begins at `first`."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    place = tl.arange(0, WIDTH)
    inside = (row < rows) & (place < SIZE)[None, :]
    column = first + tl.program_id(1) * SIZE + place
    own = tl.load(signs + sign + place, mask=place < SIZE, other=0.0)
    values = tl.load(x + row * stride + column[None, :], mask=inside, other=0.0)
    if not BACK:
        values = (values * own[None, :]).to(values.dtype)
    parity = place[:, None] & place[None, :]
    parity = parity ^ (parity >> 8)
    parity = parity ^ (parity >> 4)
    parity = parity ^ (parity >> 2)
    parity = (parity ^ (parity >> 1)) & 1
    matrix = (1 - 2 * parity).to(values.dtype)
    sums = tl.dot(values, matrix, input_precision="ieee") * (1.0 / SIZE**0.5)
    if BACK:
        sums = sums * own[None, :]
    tl.store(out + row * stride + column[None, :], sums.to(out.dtype.element_ty), mask=inside)


def turn(x: Tensor, signs: Tensor, back: bool) -> Tensor:
    """H S x, or S H x if `back`, along the last dimension [..., n]; `signs` float32 [block]."""
    size = x.shape[-1]
    flat = x.reshape(-1, size).contiguous()
    out = torch.empty_like(flat)
    if flat.numel():
        for first, last, length in blocks_of(size, len(signs)):
            grid = (-(-len(flat) // ROWS), (last - first) // length)
            turn_block[grid](
                flat,
                out,
                signs,
                len(flat),
                size,
                first,
                first % len(signs),
                BACK=back,
                SIZE=length,
                WIDTH=max(LEAST, length),
                ROWS=ROWS,
            )
    return out.reshape(x.shape)
