"""The compiled library, as two functions on tensors."""

from __future__ import annotations

import ctypes
import warnings
from dataclasses import dataclass
from enum import IntEnum
from functools import cache

import torch
from torch import Tensor

from compress_methods.kernels.cpu.build import BuildError, build, instruction_set

LINE = 128
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MASK = LINE // 8


class Matrix(ctypes.Structure):
    """`struct Matrix` of matrix.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weights", "scales", "zeros")),
        *((name, ctypes.c_int64) for name in ("rows", "lines", "bytes", "groups")),
        *((name, ctypes.c_int32) for name in ("bits", "group", "sparse", "scale_dtype")),
    )


_MATRIX = ctypes.POINTER(Matrix)
_LINEAR = (
    _MATRIX,
    ctypes.c_void_p,
    ctypes.c_int32,
    *(ctypes.c_int64,) * 3,
    *(ctypes.c_void_p,) * 2,
    ctypes.c_int32,
)
_EMBED = (_MATRIX, ctypes.c_void_p, *(ctypes.c_int64,) * 2, ctypes.c_void_p)


class Mode(IntEnum):
    """What happens to activations before they are multiplied."""

    EXACT = 0
    INT8_PER_LINE = 1
    INT8_PER_TOKEN = 2


@dataclass(frozen=True)
class Packed:
    """A matrix as the library reads it.

    `weights` uint8 [rows, lines, bytes]; `scales` [rows, groups] of any of `DTYPES`; `zeros` uint8
    [rows, groups] or None where every zero is 2^(bits - 1); `group` columns per group, 0 for rows.
    8-bit codes are stored less 128, as two's complement. `sparse`: a line is its kept values, then
    its mask of `MASK` bytes; 16 bits are then floats of the dtype of `scales`, which is empty.
    """

    weights: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    group: int
    cols: int
    sparse: bool = False

    def argument(self) -> Matrix:
        """The first argument of either function."""
        rows, lines, size = self.weights.shape
        return Matrix(
            weights=self.weights.data_ptr(),
            scales=self.scales.data_ptr() if self.scales.numel() else None,
            zeros=None if self.zeros is None else self.zeros.data_ptr(),
            rows=rows,
            lines=lines,
            bytes=size,
            groups=max(1, self.scales.shape[1]),
            bits=self.bits,
            group=self.group,
            sparse=self.sparse,
            scale_dtype=DTYPES[self.scales.dtype],
        )


class Library:
    """A loaded library; `isa` is what it was compiled for."""

    def __init__(self, isa: str) -> None:
        self.isa = isa
        loaded = ctypes.CDLL(str(build(isa)))
        self._linear, self._embed = loaded.vc_linear, loaded.vc_embed
        self._linear.argtypes, self._embed.argtypes = _LINEAR, _EMBED
        self._linear.restype = self._embed.restype = None

    def linear(self, x: Tensor, matrix: Packed, bias: Tensor | None, mode: Mode) -> Tensor:
        """x [tokens, cols] -> [tokens, rows] in its dtype, one of `DTYPES`; bias [rows]."""
        if x.stride(1) != 1:
            x = x.contiguous()
        if bias is not None:
            bias = bias.float().contiguous()
        out = torch.empty(len(x), len(matrix.weights), dtype=x.dtype)
        self._linear(
            matrix.argument(),
            x.data_ptr(),
            DTYPES[x.dtype],
            *(len(x), matrix.cols, x.stride(0)),
            0 if bias is None else bias.data_ptr(),
            out.data_ptr(),
            mode,
        )
        return out

    def embed(self, ids: Tensor, matrix: Packed) -> Tensor:
        """Rows `ids` int64 [n] -> [n, cols] float32."""
        ids = ids.to(torch.int64).contiguous()
        out = torch.empty(len(ids), matrix.cols)
        sizes = (len(ids), matrix.cols)
        self._embed(matrix.argument(), ids.data_ptr(), *sizes, out.data_ptr())
        return out


@cache
def library(isa: str | None = None) -> Library | None:
    """The library for `isa` (this machine's widest); None, after one warning, if impossible."""
    try:
        return Library(isa or instruction_set())
    except (BuildError, OSError, AttributeError) as problem:
        warnings.warn(f"vllm-compress: no CPU kernels of its own: {problem}", stacklevel=2)
        return None
