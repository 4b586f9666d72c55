"""Products with matrices whose columns are stored in another order: inputs are taken in that order,
then the base's own kernel runs.

Rows are not looked up here; the reference does that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from compress_methods.formats import Stored
from compress_methods.formats.wrappers.reordered import ORDER, Reordered
from compress_methods.kernels.base import Prepared, Want, register_kernel
from compress_methods.kernels.wrappers.wrapped import RANK, OtherInputs, prepared_base


@register_kernel
class ReorderedProduct(OtherInputs):
    """Tensors: the order int32 [cols]."""

    name: ClassVar[str] = "reordered"

    def rank(self, stored: Stored, want: Want) -> int | None:
        return RANK if isinstance(stored.format, Reordered) and not want.embed else None

    def prepare(self, stored: Stored, want: Want) -> Prepared:
        fmt = stored.format
        assert isinstance(fmt, Reordered)
        base = prepared_base(stored.nested(fmt.base), want)
        order = stored.tensors[ORDER].clone()
        return Prepared(self.name, *stored.size, [order], fmt, parts=(base,))

    def inputs(
        self, x: Tensor, tensors: Sequence[Tensor], cols: int, facts: Mapping[str, Any]
    ) -> Tensor:
        return x.index_select(-1, tensors[0])
