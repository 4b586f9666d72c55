"""Products with matrices whose columns are stored in another order: inputs are taken in that order,
then the base's own kernel runs.

The base is prepared through the table, so it has the kernel it would have alone. Rows are not
looked up here; the reference does that.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from torch import Tensor

from compress_methods.formats import Stored
from compress_methods.formats.reordered import ORDER, Reordered
from compress_methods.kernels.base import Kernel, Operator, Prepared, Want, register_kernel
from compress_methods.kernels.dispatch import kernel
from compress_methods.kernels.dispatch import prepare as prepare_by_table

RANK = 200


@register_kernel
class ReorderedProduct(Kernel):
    """Tensors: the order int32 [cols]; the part is the base."""

    name: ClassVar[str] = "reordered"

    def rank(self, stored: Stored, want: Want) -> int | None:
        return RANK if isinstance(stored.format, Reordered) and not want.embed else None

    def prepare(self, stored: Stored, want: Want) -> Prepared:
        fmt = stored.format
        assert isinstance(fmt, Reordered)
        # Padding is added to the whole, whose parts travel as text: none can be a layer's then.
        inner = replace(want, pad=0, host=None if want.pad else want.host)
        base = prepare_by_table(stored.nested(fmt.base), inner)
        order = stored.tensors[ORDER].clone()
        return Prepared(self.name, *stored.size, [order], fmt, parts=(base,))

    def matmul(self, x: Tensor, prepared: Prepared, bias: Tensor | None) -> Tensor:
        (order,), (base,) = prepared.tensors, prepared.parts
        return kernel(base.kernel).matmul(x.index_select(-1, order), base, bias)

    def operator(self, prepared: Prepared) -> Operator | None:
        (base,) = prepared.parts
        own = kernel(base.kernel).operator(base)
        if own is None:
            return None
        multiply, settings = own

        def product(x: Tensor, bias: Tensor | None, order: Tensor, *tensors: Tensor) -> Tensor:
            return multiply(x.index_select(-1, order), bias, *settings, *tensors)

        return Operator(product, ())
