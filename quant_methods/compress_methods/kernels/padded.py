"""Products with padded matrices: the base's own kernel, given inputs with zeros after them."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from compress_methods.formats import Stored
from compress_methods.formats.padded import Padded
from compress_methods.kernels.base import Kernel, Operator, Prepared, Want, register_kernel
from compress_methods.kernels.dispatch import kernel
from compress_methods.kernels.dispatch import prepare as prepare_by_table

RANK = 200


@register_kernel
class PaddedProduct(Kernel):
    """No tensors of its own; the part is the base. Of a piece that ends before the last column
    nothing is padded."""

    name: ClassVar[str] = "padded"

    def rank(self, stored: Stored, want: Want) -> int | None:
        return RANK if isinstance(stored.format, Padded) else None

    def prepare(self, stored: Stored, want: Want) -> Prepared:
        fmt = stored.format
        assert isinstance(fmt, Padded)
        rows, cols = stored.shape
        end = stored.cols[1] if stored.cols[1] < cols else fmt.padded(cols)
        whole = replace(
            stored.nested_in(fmt.base, (rows, fmt.padded(cols))), cols=(stored.cols[0], end)
        )
        inner = replace(want, pad=0, host=None if want.pad else want.host)
        return Prepared(self.name, *stored.size, [], fmt, parts=(prepare_by_table(whole, inner),))

    def matmul(self, x: Tensor, prepared: Prepared, bias: Tensor | None) -> Tensor:
        (base,) = prepared.parts
        return kernel(base.kernel).matmul(_padded(x, base.cols), base, bias)

    def operator(self, prepared: Prepared) -> Operator | None:
        (base,) = prepared.parts
        own = kernel(base.kernel).operator(base)
        if own is None:
            return None
        multiply, settings = own
        cols = base.cols

        def product(x: Tensor, bias: Tensor | None, *tensors: Tensor) -> Tensor:
            return multiply(_padded(x, cols), bias, *settings, *tensors)

        return Operator(product, ())

    def embed(self, ids: Tensor, prepared: Prepared) -> Tensor:
        (base,) = prepared.parts
        return kernel(base.kernel).embed(ids, base)[:, : prepared.cols]


def _padded(x: Tensor, cols: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, cols - x.shape[-1]))
