"""Products with a base plus two thin factors: W x = Q x + A (B x).

All three are prepared through the table, so the base has the kernel it would have alone. Inputs of
the factors stay as they are: there is little to multiply, so exactness costs little. Factors that
only the reference could multiply (integers on GPUs, whose kernels own a layer's
parameters) are unpacked once. Ranks that hold columns of a matrix each add their own share of
A (B x), before the shares are summed: the product is linear.

Rows are not looked up here; the reference does that.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from compress_methods.formats import Stored, dtype_name
from compress_methods.formats.dense import Dense
from compress_methods.formats.lowrank import LowRank
from compress_methods.kernels.base import Kernel, Operator, Prepared, Want, register_kernel
from compress_methods.kernels.cpu.gemm import CpuExact
from compress_methods.kernels.dispatch import choose, kernel
from compress_methods.kernels.dispatch import prepare as prepare_by_table
from compress_methods.kernels.reference import Reference

RANK = 200


@register_kernel
class LowRankProduct(Kernel):
    """Parts: B, A, and the base where there is one."""

    name: ClassVar[str] = "lowrank"

    def rank(self, stored: Stored, want: Want) -> int | None:
        return RANK if isinstance(stored.format, LowRank) and not want.embed else None

    def prepare(self, stored: Stored, want: Want) -> Prepared:
        fmt = stored.format
        assert isinstance(fmt, LowRank)
        parts = [_thin(factor, want) for factor in (fmt.right(stored), fmt.left(stored))]
        if fmt.base is not None:
            # Padding is added to the whole, whose parts travel as text: none can be a layer's then.
            inner = replace(want, pad=0, host=None if want.pad else want.host)
            parts.append(prepare_by_table(stored.nested(fmt.base), inner))
        return Prepared(self.name, *stored.size, (), fmt, parts=tuple(parts))

    def matmul(self, x: Tensor, prepared: Prepared, bias: Tensor | None) -> Tensor:
        fmt, (right, left, *base) = prepared.format, prepared.parts
        assert isinstance(fmt, LowRank)
        thin = kernel(right.kernel).matmul(fmt.quantize_activations(x), right, None)
        if not base:
            return kernel(left.kernel).matmul(thin, left, bias)
        sums = kernel(base[0].kernel).matmul(x, base[0], bias)
        return sums + kernel(left.kernel).matmul(thin, left, None)

    def operator(self, prepared: Prepared) -> Operator | None:
        fmt = prepared.format
        assert isinstance(fmt, LowRank)
        found = [kernel(part.kernel).operator(part) for part in prepared.parts]
        own = [operator for operator in found if operator is not None]
        if len(own) < len(found):
            return None
        counts = [len(part.flat()) for part in prepared.parts]
        first, second = counts[0], counts[0] + counts[1]
        right, left, *base = own

        def product(x: Tensor, bias: Tensor | None, *tensors: Tensor) -> Tensor:
            inputs = fmt.quantize_activations(x)
            thin = right.function(inputs, None, *right.settings, *tensors[:first])
            outer = None if base else bias
            out = left.function(thin, outer, *left.settings, *tensors[first:second])
            if not base:
                return out
            return base[0].function(x, bias, *base[0].settings, *tensors[second:]) + out

        return Operator(product, ())


def _thin(factor: Stored, want: Want) -> Prepared:
    """Runtime form of A or B."""
    exact = replace(want, pad=0, host=None, kernel=CpuExact.name)
    if choose(factor, exact).name == Reference.name:
        dtype = dtype_name(want.dtype or torch.float32)
        plain = Dense(dtype)
        factor = Stored.whole(plain, plain.pack(factor.values()), factor.size)
    return prepare_by_table(factor, exact)
