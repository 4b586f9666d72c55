"""The compiled library, as two torch operators (`operators.cpp`)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from typing import Any

import torch
from torch import Tensor

from compress_methods.kernels.cpu.build import BuildError, build, instruction_set, namespace

LINE = 128
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MASK = LINE // 8


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

    @property
    def settings(self) -> tuple[int, int, bool]:
        """What both operators take before the three tensors."""
        return self.bits, self.group, self.sparse


class Library:
    """A loaded library; `isa` is what it was compiled for, `product` its operator:
    product(x, bias, mode, *settings, weights, scales, zeros), x [..., cols] -> [..., rows]."""

    def __init__(self, isa: str) -> None:
        self.isa = isa
        torch.ops.load_library(str(build(isa)))
        operators = getattr(torch.ops, namespace(isa))
        self.product, self._embed = operators.linear.default, operators.embed.default
        for operator, shape in ((self.product, _linear_shape), (self._embed, _embed_shape)):
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
    bits: int,
    group: int,
    sparse: bool,
    weights: Tensor,
    *others: Any,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weights))


def _embed_shape(
    ids: Tensor, cols: int, bits: int, group: int, sparse: bool, weights: Tensor, *others: Any
) -> Tensor:
    return ids.new_empty(*ids.shape, cols, dtype=torch.float32)


@cache
def library(isa: str | None = None) -> Library | None:
    """The library for `isa` (this machine's widest); None, after one warning, if impossible."""
    try:
        return Library(isa or instruction_set())
    except (BuildError, OSError, AttributeError) as problem:
        warnings.warn(f"vllm-compress: no CPU kernels of its own: {problem}", stacklevel=2)
        return None
