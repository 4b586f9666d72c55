"""Products with integers whose groups have float offsets: W x = Q x + O s, where Q are the codes
counted from their middle, and s the sums of x in groups of columns.

The base is prepared through the table, so it has the kernel it would have alone. O is [groups,
rows] float32, small since values lie on both sides of a group's middle; it is multiplied by torch,
in float32. Ranks that hold columns of a matrix hold the offsets of their own groups.

Rows are not looked up here; the reference does that.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from compress_methods.formats import Stored
from compress_methods.formats.encoding.grouped import SCALES
from compress_methods.formats.wrappers.shifted import OFFSETS, Shifted, centred
from compress_methods.kernels.base import Kernel, Operator, Prepared, Want, register_kernel
from compress_methods.kernels.dispatch import kernel
from compress_methods.kernels.wrappers.wrapped import RANK, prepared_base


@register_kernel
class ShiftedProduct(Kernel):
    """Tensors: offsets [groups, rows] float32; the part is the base."""

    name: ClassVar[str] = "shifted"

    def rank(self, stored: Stored, want: Want) -> int | None:
        return RANK if isinstance(stored.format, Shifted) and not want.embed else None

    def prepare(self, stored: Stored, want: Want) -> Prepared:
        fmt = stored.format
        assert isinstance(fmt, Shifted)
        offsets = centred(fmt, stored.tensors[SCALES], stored.tensors[OFFSETS])
        base = prepared_base(stored.nested(fmt.base), want)
        return Prepared(self.name, *stored.size, [offsets.T.contiguous()], fmt, parts=(base,))

    def matmul(self, x: Tensor, prepared: Prepared, bias: Tensor | None) -> Tensor:
        (base,), (offsets,) = prepared.parts, prepared.tensors
        return _added(kernel(base.kernel).matmul(x, base, bias), x, offsets)

    def operator(self, prepared: Prepared) -> Operator | None:
        (base,) = prepared.parts
        own = kernel(base.kernel).operator(base)
        if own is None:
            return None
        multiply, settings = own

        def product(x: Tensor, bias: Tensor | None, *tensors: Tensor) -> Tensor:
            offsets, *rest = tensors
            return _added(multiply(x, bias, *settings, *rest), x, offsets)

        return Operator(product, ())


def _added(product: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    sums = x.float().unflatten(-1, (len(offsets), -1)).sum(-1)
    return (product + sums @ offsets).to(product.dtype)
