"""Products with a base plus two thin factors: W x = Q x + A (B x).

The base is prepared through the table, so it has the kernel it would have alone. Where that can
do all three in one call (`Kernel.corrected`: ours on CPUs) it does for up to `FEW` tokens, at which
reading weights is what takes the time. Else torch multiplies the factors, whose values lie in the
dtype of the activations, whatever they are stored in. Ranks that hold columns of a matrix each add
their own share of A (B x), before the shares are summed: the product is linear.

Rows are not looked up here; the reference does that.
"""

from __future__ import annotations

from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from compress_methods.formats import Stored
from compress_methods.formats.wrappers.lowrank import LowRank
from compress_methods.kernels.base import Kernel, Operator, Prepared, Want, register_kernel
from compress_methods.kernels.dispatch import kernel
from compress_methods.kernels.wrappers.wrapped import RANK, prepared_base

FEW = 8


@register_kernel
class LowRankProduct(Kernel):
    """Tensors: A by columns [rank, rows] and B [rank, cols]; the part is the base, if any."""

    name: ClassVar[str] = "lowrank"

    def rank(self, stored: Stored, want: Want) -> int | None:
        return RANK if isinstance(stored.format, LowRank) and not want.embed else None

    def prepare(self, stored: Stored, want: Want) -> Prepared:
        fmt = stored.format
        assert isinstance(fmt, LowRank)
        dtype = want.dtype or torch.float32
        factors = (fmt.left(stored).values().T, fmt.right(stored).values())
        tensors = [factor.to(dtype).contiguous() for factor in factors]
        parts: tuple[Prepared, ...] = ()
        if fmt.base is not None:
            parts = (prepared_base(stored.nested(fmt.base), want),)
        inputs = torch.zeros(1, stored.size[1])
        facts = {"plain": fmt.quantize_activations(inputs) is inputs}
        return Prepared(self.name, *stored.size, tensors, fmt, parts=parts, facts=facts)

    def matmul(self, x: Tensor, prepared: Prepared, bias: Tensor | None) -> Tensor:
        fmt = prepared.format
        assert isinstance(fmt, LowRank)
        fused = _fused(prepared)
        if fused is not None and len(x) <= FEW and x.dtype.itemsize <= 4:
            out: Tensor = fused.function(x, bias, *fused.settings, *prepared.flat())
            return out
        sums = bias
        if prepared.parts:
            (base,) = prepared.parts
            sums = kernel(base.kernel).matmul(x, base, bias)
        return _added(sums, fmt.quantize_activations(x), *prepared.tensors)

    def operator(self, prepared: Prepared) -> Operator | None:
        fmt = prepared.format
        assert isinstance(fmt, LowRank)
        if _fused(prepared) is not None:
            return None  # which of the two is called depends on the tokens
        if not prepared.parts:
            return Operator(lambda x, bias, *factors: _added(bias, x, *factors), ())
        (base,) = prepared.parts
        own = kernel(base.kernel).operator(base)
        if own is None:
            return None
        multiply, settings = own

        def product(x: Tensor, bias: Tensor | None, *tensors: Tensor) -> Tensor:
            left, right, *rest = tensors
            sums = multiply(x, bias, *settings, *rest)
            return _added(sums, fmt.quantize_activations(x), left, right)

        return Operator(product, ())


def _fused(prepared: Prepared) -> Operator | None:
    """All of the product as one operator; not where factors see what the base makes of inputs."""
    if not (prepared.parts and prepared.facts["plain"]):
        return None
    (base,) = prepared.parts
    return kernel(base.kernel).corrected(base)


def _added(sums: Tensor | None, x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """sums + A (B x) in the dtype of `x`."""
    dtype = torch.float32 if x.device.type == "cpu" and _slow_in_16_bits() else right.dtype
    product = (x.to(dtype) @ right.to(dtype).T) @ left.to(dtype)
    return (product if sums is None else sums + product).to(x.dtype)


@cache
def _slow_in_16_bits() -> bool:
    """Whether this processor has no instructions for them: torch then takes ten times as long."""
    return not torch.ops.mkldnn._is_mkldnn_bf16_supported()
