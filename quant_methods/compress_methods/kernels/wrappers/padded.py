"""Products with padded matrices: the base's own kernel, given inputs with zeros after them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor

from compress_methods.formats import Stored
from compress_methods.formats.wrappers.padded import Padded, with_zeros
from compress_methods.kernels.base import Prepared, Want, register_kernel
from compress_methods.kernels.dispatch import kernel
from compress_methods.kernels.wrappers.wrapped import RANK, OtherInputs, prepared_base

PARTS = "parts"


@register_kernel
class PaddedProduct(OtherInputs):
    """No tensors of its own. Of a piece that ends before the last column nothing is padded."""

    name: ClassVar[str] = "padded"

    def rank(self, stored: Stored, want: Want) -> int | None:
        return RANK if isinstance(stored.format, Padded) else None

    def prepare(self, stored: Stored, want: Want) -> Prepared:
        fmt = stored.format
        assert isinstance(fmt, Padded)
        (rows, cols), (start, end) = stored.shape, stored.cols
        count = 1
        if fmt.parts > 1:
            count = (end - start) // fmt.part
            start, end = (fmt.padded(fmt.part) * (place // fmt.part) for place in (start, end))
        elif end == cols:
            end = fmt.padded(cols)
        whole = replace(stored.nested_in(fmt.base, (rows, fmt.padded(cols))), cols=(start, end))
        base, facts = prepared_base(whole, want), {PARTS: count}
        return Prepared(self.name, *stored.size, [], fmt, parts=(base,), facts=facts)

    def inputs(
        self, x: Tensor, tensors: Sequence[Tensor], cols: int, facts: Mapping[str, Any]
    ) -> Tensor:
        return with_zeros(x, cols, facts[PARTS])

    def embed(self, ids: Tensor, prepared: Prepared) -> Tensor:
        (base,), fmt = prepared.parts, prepared.format
        assert isinstance(fmt, Padded)
        found = kernel(base.kernel).embed(ids, base)
        return fmt.turn_back(found) if fmt.parts > 1 else found[:, : prepared.cols]
