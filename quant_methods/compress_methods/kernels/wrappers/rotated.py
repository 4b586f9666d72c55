"""Products with rotated matrices: the input's transform, the base's own kernel, the output's.

The base is prepared through the table, so it has the kernel it would have alone. Where that can do
all three in one call (`Kernel.rotated`: ours on CPUs) it does. Else the transforms are the operator
`compress_methods::turn`: Triton on GPUs (`triton/hadamard.py`), plain torch elsewhere, where Triton
is missing and for blocks above `MOST_IN_TRITON`. A transform is linear, so ranks that hold columns
of a matrix each turn their own share of the output, before the shares are summed.

Rows are not looked up here: a row is a mixture of its whole block. The reference does that.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from compress_methods.formats import Stored
from compress_methods.formats.wrappers.rotated import INPUTS, OUTPUTS, Rotated, hadamard
from compress_methods.kernels.base import Kernel, Operator, Prepared, Want, register_kernel
from compress_methods.kernels.dispatch import kernel
from compress_methods.kernels.wrappers.wrapped import RANK, prepared_base

MOST_IN_TRITON = 128
Turn = Callable[[Tensor, Tensor, bool], Tensor]


@register_kernel
class RotatedProduct(Kernel):
    """Tensors: signs [2, block] float32, of inputs and of outputs; the part is the base."""

    name: ClassVar[str] = "rotated"

    def rank(self, stored: Stored, want: Want) -> int | None:
        return RANK if isinstance(stored.format, Rotated) and not want.embed else None

    def prepare(self, stored: Stored, want: Want) -> Prepared:
        fmt = stored.format
        assert isinstance(fmt, Rotated)
        base = prepared_base(stored.nested(fmt.base), want)
        signs = torch.stack([fmt.signs(INPUTS), fmt.signs(OUTPUTS)]).to(stored.device)
        return Prepared(self.name, *stored.size, [signs], fmt, parts=(base,))

    def matmul(self, x: Tensor, prepared: Prepared, bias: Tensor | None) -> Tensor:
        (base,) = prepared.parts
        fused = kernel(base.kernel).rotated(base)
        if fused is not None and x.dtype.itemsize <= 4:
            out: Tensor = fused.function(x, bias, *fused.settings, *prepared.flat())
            return out
        (signs,) = prepared.tensors
        inputs = torch.ops.compress_methods.turn(x, signs[0], False)
        sums = kernel(base.kernel).matmul(inputs, base, None)
        return _finished(sums, signs, bias)

    def operator(self, prepared: Prepared) -> Operator | None:
        (base,) = prepared.parts
        fused = kernel(base.kernel).rotated(base)
        if fused is not None:
            return fused
        own = kernel(base.kernel).operator(base)
        if own is None:
            return None
        multiply, settings = own

        def product(x: Tensor, bias: Tensor | None, signs: Tensor, *tensors: Tensor) -> Tensor:
            inputs = torch.ops.compress_methods.turn(x, signs[0], False)
            return _finished(multiply(inputs, None, *settings, *tensors), signs, bias)

        return Operator(product, ())


def _finished(sums: Tensor, signs: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.compress_methods.turn(sums, signs[1], True)
    return out if bias is None else (out + bias).to(out.dtype)


def turn(x: Tensor, signs: Tensor, back: bool) -> Tensor:
    """H S x, or S H x if `back`, along the last dimension, in the dtype of `x`, summed in float32;
    `signs` [block]."""
    fits = x.is_cuda and len(signs) <= MOST_IN_TRITON
    in_triton = turn_in_triton() if fits else None
    return (in_triton or turn_in_torch)(x, signs, back)


@cache
def turn_in_triton() -> Turn | None:
    """The same in Triton, where it can be imported."""
    try:
        from compress_methods.kernels.triton import hadamard as in_triton
    except ImportError:
        return None
    return in_triton.turn


def turn_in_torch(x: Tensor, signs: Tensor, back: bool) -> Tensor:
    """The same on any device."""
    size, block = x.shape[-1], len(signs)
    along = signs.repeat(-(-size // block))[:size]
    values = x.float() if back else x.float() * along
    values = hadamard(values, -1, block)
    return (values * along if back else values).to(x.dtype)


LIBRARY = torch.library.Library("compress_methods", "FRAGMENT")
LIBRARY.define("turn(Tensor x, Tensor signs, bool back) -> Tensor")
LIBRARY.impl("turn", turn, "CompositeExplicitAutograd")
torch.library.register_fake(
    "compress_methods::turn", lambda x, signs, back: torch.empty_like(x), lib=LIBRARY
)
