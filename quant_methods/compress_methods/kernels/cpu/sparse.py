"""How our CPU product reads format `sparse`: lines of 128 columns, all of the same size.

A line of a row keeps 128*n/m values: it is these values, then 16 bytes of mask. Values of 8 bits
are bytes (signed, row by row); of 4, 3 and 2 bits half bytes plus 8, in blocks of 32; dense ones
two bytes as they are. With AVX-512 a line is of 16 rows: values and mask in the order in which
vectors take them, 16 rows x 4 columns, or x 1 where values are dense. The kernel spreads them out:
64 places in one instruction with AVX-512, 8 in a table look-up else. Bytes in memory are those of
the checkpoint (3 and 2 bits excepted, and rows and columns are padded to whole lines), nothing else
is kept.

Takes symmetric integers whose groups are whole rows, or of a `group_size` that is a multiple of n
so that a group covers 32, 64 or a multiple of 128 columns; and dense values of 16 bits. The rest is
left to the reference.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from compress_methods.formats import MAIN_TENSOR, Stored, torch_dtype
from compress_methods.formats.dense import Dense
from compress_methods.formats.encoding.codes import pack_codes
from compress_methods.formats.encoding.grouped import SCALES
from compress_methods.formats.integer import Integer
from compress_methods.formats.sparse import Sparse, pack_mask
from compress_methods.kernels.base import Prepared
from compress_methods.kernels.cpu.library import LINE, Kind, Packed, empty_bytes, side_by_side

HALF, BYTE, WORD = 4, 8, 16
HALF_BLOCK = 32
SLAB_ELEMENTS = 2**22


def takes(fmt: Sparse) -> bool:
    """Whether the product knows the values of a sparse format."""
    if isinstance(fmt.values, Dense):
        return torch_dtype(fmt.values.dtype).itemsize == 2
    return isinstance(fmt.values, Integer) and fmt.values.symmetric and _group(fmt) is not None


def prepare(stored: Stored, together: int) -> list[Tensor]:
    """weights uint8 [blocks, lines, bytes], and scales [blocks, groups, together] (no last
    dimension where that is one) of integers.

    Raises `FormatError` for a mask that keeps another count than n, which could not be read safely.
    """
    fmt, (rows, cols) = stored.format, stored.size
    assert isinstance(fmt, Sparse)
    lines, blocks = -(-cols // LINE), -(-rows // together)
    size_of_values = _bytes(fmt, together)
    out = empty_bytes(blocks, lines, size_of_values + together * LINE // 8)
    step = max(1, SLAB_ELEMENTS // cols // together)
    for block in range(0, blocks, step):
        first, last = block * together, min((block + step) * together, rows)
        at = stored.rows[0]
        part = dict(stored.cut(rows=(at + first, at + last)).tensors)
        mask, values = _padded(fmt, part, lines * LINE, -(last - first) % together)
        if together > 1:
            size = values.dtype.itemsize
            mask, values = _by_vectors(mask, size, together), _by_vectors(values, size, together)
        mask = mask.reshape(-1, lines, together * LINE)
        values = values.reshape(mask.shape)
        kept = values[mask].reshape(len(mask) * lines, -1)
        slab = out[block : block + step]
        bytes_of_line = _stored(fmt, kept, together).reshape(len(mask), lines, size_of_values)
        slab[..., :size_of_values] = bytes_of_line
        slab[..., size_of_values:] = pack_mask(mask.flatten(1)).reshape(len(mask), lines, -1)
    if isinstance(fmt.values, Dense):
        return [out]
    scales, group = stored.tensors[SCALES], _group(fmt)
    groups = -(-lines * LINE // group) if group else 1
    missing = (0, groups - scales.shape[1], 0, -rows % together)
    return [out, side_by_side(pad(scales, missing, value=1), together).clone()]


def packed(fmt: Sparse, prepared: Prepared) -> Packed:
    """Prepared tensors as the library takes them."""
    weights, *scales = prepared.tensors
    if isinstance(fmt.values, Dense):
        none = torch.empty(0, 0, dtype=torch_dtype(fmt.values.dtype))
        return Packed(weights, none, None, prepared.rows, WORD, 0, prepared.cols, Kind.SPARSE)
    group = _group(fmt)
    assert group is not None
    settings = (prepared.rows, _bits(fmt), group, prepared.cols)
    return Packed(weights, scales[0], None, *settings, Kind.SPARSE)


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


def _bytes(fmt: Sparse, together: int) -> int:
    """Bytes of a line's values."""
    kept, bits = fmt.kept(LINE) * together, _bits(fmt)
    return -(-kept // HALF_BLOCK) * HALF_BLOCK // 2 if bits == HALF else kept * bits // 8


def _padded(fmt: Sparse, tensors: dict[str, Tensor], cols: int, rows: int) -> tuple[Tensor, Tensor]:
    """Mask and values [rows of `tensors` + `rows`, cols]. Places added keep as many zeros as those
    of the matrix keep values, so that all lines are alike."""
    mask = fmt.mask(tensors)
    if isinstance(fmt.values, Integer):
        kept = fmt.values.solution(tensors).codes
        kept = kept + (2 ** (_bits(fmt) - 1) - 2 ** (fmt.values.bits - 1))
        nothing = 2 ** (_bits(fmt) - 1)
    else:
        kept, nothing = tensors[MAIN_TENSOR].view(torch.int16), 0
    values = torch.full(mask.shape, nothing, dtype=kept.dtype).masked_scatter_(mask, kept)
    missing = (0, cols - mask.shape[1], 0, rows)
    pattern = (torch.arange(cols) % fmt.m < fmt.n).repeat(len(mask) + rows, 1)
    pattern[: len(mask), : mask.shape[1]] = mask
    return pattern, pad(values, missing, value=nothing)


def _by_vectors(x: Tensor, size: int, together: int) -> Tensor:
    """[rows, cols] -> [blocks, cols / n, rows of a block, n], n columns to four bytes of values of
    `size` bytes, but one of those that become floats."""
    columns = 1 if size > 1 else 4
    x = x.unflatten(1, (-1, columns)).unflatten(0, (-1, together))
    return x.transpose(1, 2).contiguous()


def _stored(fmt: Sparse, kept: Tensor, together: int) -> Tensor:
    """Values of whole lines [lines, n] as uint8 [lines, bytes]."""
    if _bits(fmt) == HALF:
        return pack_codes(pad(kept, (0, -kept.shape[1] % HALF_BLOCK)), HALF, HALF_BLOCK)
    if _bits(fmt) == BYTE and together == 1:
        kept = kept ^ (1 << (BYTE - 1))
    return kept.contiguous().view(torch.uint8)
