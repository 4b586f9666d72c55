"""Products with padded matrices: the base's own kernel, given inputs with zeros after them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from compress_methods.formats import Stored
from compress_methods.formats.padded import Padded
from compress_methods.kernels.base import Prepared, Want, register_kernel
from compress_methods.kernels.dispatch import kernel
from compress_methods.kernels.wrapped import RANK, OtherInputs, prepared_base


@register_kernel
class PaddedProduct(OtherInputs):
    """No tensors of its own. Of a piece that ends before the last column nothing is padded."""

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
        return Prepared(self.name, *stored.size, [], fmt, parts=(prepared_base(whole, want),))

    def inputs(self, x: Tensor, tensors: Sequence[Tensor], cols: int) -> Tensor:
        return torch.nn.functional.pad(x, (0, cols - x.shape[-1]))

    def embed(self, ids: Tensor, prepared: Prepared) -> Tensor:
        (base,) = prepared.parts
        return kernel(base.kernel).embed(ids, base)[:, : prepared.cols]
