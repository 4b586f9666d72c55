"""The compiled library, as torch operators (`operators.cpp`)."""

from __future__ import annotations

import contextlib
import math
import mmap
import warnings
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from typing import Any

import torch
from torch import Tensor

from compress_methods.kernels.cpu.build import build, instruction_set, namespace

LINE = 128
HUGE_PAGE = 2**21
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Mode(IntEnum):
    """What happens to activations before they are multiplied."""

    EXACT = 0
    INT8_PER_LINE = 1
    INT8_PER_TOKEN = 2


class Kind(IntEnum):
    """How a matrix is stored."""

    WHOLE = 0
    SPARSE = 1
    MID = 2
    LOOKUP = 3
    FLOATS = 4
    TRELLIS = 5
    VALUES = 6


@dataclass(frozen=True)
class Packed:
    """A matrix as the library reads it, by blocks of `rows_together` rows.

    `weights` uint8 [blocks, lines, bytes]; `scales` [blocks, groups, rows of one] of any of
    `DTYPES`; `zeros` uint8 like them, or None where every zero is 2^(bits - 1); `group` columns per
    group, 0 for rows. `kind` sparse: a line is its kept values, then its mask; 16 bits are then
    floats of the dtype of `scales`, which is empty. `kind` mid: every zero is 2^(bits - 1) - 1/2,
    and `scales` are half of what they are. `kind` look-up: in place of zeros, tables uint8 [n, 16]
    of which every row, or every 16 rows, have one. `kind` floats, E2M1 or E4M3: in place of zeros,
    None or float32 [rows of all blocks] that multiply rows; scales may also be E4M3, or uint8 that
    are E8M0, and 2-dimensional, for 128 rows each. `kind` trellis: its 8th and higher bits say how
    many bits a window has; without zeros. `kind` values: in place of zeros, the 16 float32 that
    codes of 4 bits stand for.
    """

    weights: Tensor
    scales: Tensor
    zeros: Tensor | None
    rows: int
    bits: int
    group: int
    cols: int
    kind: int = Kind.WHOLE

    @property
    def settings(self) -> tuple[int, int, int, int]:
        """What both operators take before the three tensors."""
        return self.rows, self.bits, self.group, self.kind


class Library:
    """A loaded library; `isa` is what it was compiled for, `product` its operator:
    product(x, bias, mode, *settings, weights, scales, zeros), x [..., cols] -> [..., rows].

    `rotated`, of a matrix that is, takes its signs [2, block] float32 before the weights;
    `corrected` A by columns [rank, rows] and B [rank, cols], whose product is added. `encode` finds
    paths through a trellis.
    """

    def __init__(self, isa: str) -> None:
        self.isa = isa
        torch.ops.load_library(str(build(isa)))
        operators = getattr(torch.ops, namespace(isa))
        self.rows_together: int = operators.rows_together.default()
        self.product, self._embed = operators.linear.default, operators.embed.default
        self.encode = operators.encode.default
        self.rotated, self.corrected = operators.rotated.default, operators.corrected.default
        for operator, shape in (
            (self.product, _linear_shape),
            (self.rotated, _linear_shape),
            (self.corrected, _linear_shape),
            (self._embed, _embed_shape),
        ):
            torch.library.register_fake(operator, shape)

    def linear(self, x: Tensor, matrix: Packed, bias: Tensor | None, mode: Mode) -> Tensor:
        """x [..., cols] -> [..., rows] in its dtype; x and bias [rows] of any of `DTYPES`."""
        tensors = (matrix.weights, matrix.scales, matrix.zeros)
        out: Tensor = self.product(x, bias, mode, *matrix.settings, *tensors)
        return out

    def embed(self, ids: Tensor, matrix: Packed) -> Tensor:
        """Rows `ids` int64 [...] -> [..., cols] float32."""
        tensors = (matrix.weights, matrix.scales, matrix.zeros)
        out: Tensor = self._embed(ids.to(torch.int64), matrix.cols, *matrix.settings, *tensors)
        return out


def _linear_shape(
    x: Tensor,
    bias: Tensor | None,
    mode: int,
    rows: int,
    *others: Any,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows)


def _embed_shape(ids: Tensor, cols: int, *others: Any) -> Tensor:
    return ids.new_empty(*ids.shape, cols, dtype=torch.float32)


def empty_bytes(*shape: int) -> Tensor:
    """uint8 for weights, in huge pages where Linux grants them: they are read faster."""
    size = math.prod(shape)
    if size < 2 * HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=torch.uint8)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8).view(shape)


def side_by_side(x: Tensor, together: int) -> Tensor:
    """[rows, n] -> [rows / together, n, together], or as it is where that is one."""
    return x if together == 1 else x.unflatten(0, (-1, together)).transpose(1, 2).contiguous()


@cache
def library(isa: str | None = None) -> Library | None:
    """The library for `isa` (this machine's widest); None, after one warning, if impossible."""
    try:
        return Library(isa or instruction_set())
    except (RuntimeError, OSError, AttributeError) as problem:
        warnings.warn(f"vllm-compress: no CPU kernels of its own: {problem}", stacklevel=2)
        return None
