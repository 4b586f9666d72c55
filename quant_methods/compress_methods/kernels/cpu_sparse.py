"""How our CPU product reads format `sparse`: lines of 128 columns, all of the same size.

A line keeps 128*n/m values: it is these values, then 16 bytes of mask. Values of 8 bits are signed
bytes; of 4, 3 and 2 bits half bytes less 8, in blocks of 32; dense ones two bytes as they are. The
kernel spreads them out: 64 columns in one instruction with AVX-512, 8 in a table look-up else.
Bytes in memory are those of the checkpoint (3 and 2 bits excepted, and columns are padded to whole
lines), nothing else is kept.

Takes symmetric integers whose groups are whole rows, or of a `group_size` that is a multiple of n
so that a group covers 32, 64 or a multiple of 128 columns; and dense values of 16 bits. The rest is
left to the reference.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from compress_methods.formats.base import Prepared
from compress_methods.formats.dense import DTYPES, Dense
from compress_methods.formats.integer import Integer, pack_codes
from compress_methods.formats.sparse import MASK as MASK_TENSOR
from compress_methods.formats.sparse import Sparse
from compress_methods.kernels.cpu.library import LINE, MASK, Packed

HALF, BYTE, WORD = 4, 8, 16
HALF_BLOCK = 32
SLAB_ELEMENTS = 2**22


def takes(fmt: Sparse) -> bool:
    """Whether the product knows the values of a sparse format."""
    if isinstance(fmt.values, Dense):
        return DTYPES[fmt.values.dtype].itemsize == 2
    return isinstance(fmt.values, Integer) and fmt.values.symmetric and _group(fmt) is not None


def prepare(fmt: Sparse, tensors: dict[str, Tensor], rows: int, cols: int) -> list[Tensor]:
    """weights uint8 [rows, lines, bytes], and scales [rows, groups] where values are integers.

    Raises `FormatError` for a mask that keeps another count than n, which could not be read safely.
    """
    lines = -(-cols // LINE)
    out = torch.empty(rows, lines, _bytes(fmt) + MASK, dtype=torch.uint8)
    step = max(1, SLAB_ELEMENTS // cols)
    for first in range(0, rows, step):
        last = min(first + step, rows)
        part = fmt.slice(tensors, (rows, cols), rows=(first, last))
        fmt.mask(part)
        mask = pad(part[MASK_TENSOR], (0, lines * MASK - cols // 8))
        out[first:last, :, -MASK:] = mask.unflatten(1, (lines, MASK))
        out[first:last, :, :-MASK] = _values(fmt, part, lines)
    if isinstance(fmt.values, Dense):
        return [out]
    scales, group = tensors["weight_scales"], _group(fmt)
    groups = -(-lines * LINE // group) if group else 1
    return [out, pad(scales, (0, groups - scales.shape[1]), value=1).clone()]


def packed(fmt: Sparse, prepared: Prepared) -> Packed:
    """Prepared tensors as the library takes them."""
    weights, *scales = prepared.tensors
    if isinstance(fmt.values, Dense):
        none = torch.empty(0, 0, dtype=DTYPES[fmt.values.dtype])
        return Packed(weights, none, None, WORD, 0, prepared.cols, sparse=True)
    group = _group(fmt)
    assert group is not None
    return Packed(weights, scales[0], None, _bits(fmt), group, prepared.cols, sparse=True)


def _group(fmt: Sparse) -> int | None:
    """Columns of the matrix per scale: 0 for whole rows, None where lines cannot have it."""
    assert isinstance(fmt.values, Integer)
    size = fmt.values.group_size
    if size < 0:
        return 0
    columns = size // fmt.n * fmt.m
    fits = size % fmt.n == 0 and (columns in (32, 64) or columns % LINE == 0)
    return columns if fits else None


def _bits(fmt: Sparse) -> int:
    if isinstance(fmt.values, Dense):
        return WORD
    assert isinstance(fmt.values, Integer)
    return HALF if fmt.values.bits <= HALF else BYTE


def _bytes(fmt: Sparse) -> int:
    """Bytes of a line's values."""
    kept, bits = fmt.kept(LINE), _bits(fmt)
    return -(-kept // HALF_BLOCK) * HALF_BLOCK // 2 if bits == HALF else kept * bits // 8


def _values(fmt: Sparse, tensors: dict[str, Tensor], lines: int) -> Tensor:
    """uint8 [rows, lines, bytes] of stored values."""
    kept, rows = fmt.kept(LINE), len(tensors[MASK_TENSOR])
    if isinstance(fmt.values, Integer):
        codes = fmt.values.solution(tensors).codes
        codes = codes + (2 ** (_bits(fmt) - 1) - 2 ** (fmt.values.bits - 1))
    else:
        codes = tensors["weight_packed"]
    codes = pad(codes, (0, lines * kept - codes.shape[1])).reshape(rows * lines, kept)
    if _bits(fmt) == HALF:
        codes = pack_codes(pad(codes, (0, -kept % HALF_BLOCK)), HALF, HALF_BLOCK)
    elif _bits(fmt) == BYTE:
        codes = codes ^ (1 << (BYTE - 1))
    return codes.view(torch.uint8).reshape(rows, lines, -1)
