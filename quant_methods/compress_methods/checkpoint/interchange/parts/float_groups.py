"""Floats of 8 and 4 bits with scales, as other tools store them: value = scale * float.

A scale belongs to the tensor, a row, columns of a row, or a block of rows and columns. The first
two, blocks of 128 x 128 and the microscaling kinds are formats of ours; anything else is dense.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from compress_methods.errors import CheckpointError, FormatError
from compress_methods.formats import Format
from compress_methods.formats.dense import Dense
from compress_methods.formats.encoding.grouped import GROUP_SIZES
from compress_methods.formats.encoding.small_floats import decode_e4m3
from compress_methods.formats.floats import BLOCK, FP8, Float, FloatSolution
from compress_methods.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, int]
DENSE = Dense("float32")


def fp8_format(
    shape: Shape, scales: Tensor, block: Shape | None, activations: str | None = None
) -> Float | None:
    """What holds E4M3 values [rows, cols] with these scales exactly; `block`: of a scale."""
    rows, cols = shape
    size, group_rows = -1, 1
    if block is not None and scales.numel() > 1:
        size, group_rows = block[1], block[0]
    elif scales.dim() == 2 and scales.shape[1] > 1:
        size = cols // scales.shape[1]
    if (group_rows, size) not in ((BLOCK, BLOCK), *((1, s) for s in GROUP_SIZES)):
        return None
    if size > 0 and group_rows == 1 and not torch.equal(scales.bfloat16().float(), scales.float()):
        return None
    with contextlib.suppress(FormatError):
        fmt = Float(FP8, size, group_rows, activations)
        fmt.check_shape(rows, cols)
        return fmt
    return None


def read_fp8(
    weight: Tensor, scales: Tensor, block: Shape | None, activations: str | None = None
) -> tuple[Format, Any]:
    """Format and solution of `weight` float8_e4m3fn [rows, cols]."""
    rows, cols = weight.shape
    fmt = fp8_format((rows, cols), scales, block, activations)
    codes = weight.view(torch.uint8)
    if fmt is None:
        return DENSE, decode_e4m3(codes) * spread_over(scales.float(), (rows, cols), block)
    values = scales.float()
    if fmt.group_size < 0:
        values = values.reshape(-1, 1).expand(rows, 1)
    return fmt, FloatSolution(codes, values.contiguous())


def spread_over(scales: Tensor, shape: Shape, block: Shape | None) -> Tensor:
    """float32 [rows, cols], or what broadcasts to it, of the scale of every value."""
    rows, cols = shape
    if block is not None and scales.numel() > 1:
        if scales.shape != (-(-rows // block[0]), -(-cols // block[1])):
            raise CheckpointError(
                f"scales are {list(scales.shape)}, expected one for every {block[0]} x {block[1]} "
                f"of {list(shape)}"
            )
        tall = scales.repeat_interleave(block[0], 0)[:rows]
        return tall.repeat_interleave(block[1], 1)[:, :cols]
    if scales.numel() in (1, rows):
        return scales.reshape(-1, 1)
    if scales.dim() != 2 or len(scales) != rows or cols % scales.shape[1]:
        raise CheckpointError(f"scales are {list(scales.shape)}, weights {list(shape)}")
    return scales.repeat_interleave(cols // scales.shape[1], 1)
