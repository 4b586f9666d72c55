"""Matrices stored as they are, such as the factors of a `lowrank` format: torch's own product."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from compress_methods.formats import MAIN_TENSOR, Stored
from compress_methods.formats.dense import Dense
from compress_methods.kernels.base import (
    Kernel,
    Operator,
    Prepared,
    Want,
    check_ids,
    register_kernel,
)

RANK = 100


@register_kernel
class DenseProduct(Kernel):
    """Values in the dtype of the activations, where that is known; else in their own."""

    name: ClassVar[str] = "dense"

    def rank(self, stored: Stored, want: Want) -> int | None:
        return RANK if isinstance(stored.format, Dense) else None

    def prepare(self, stored: Stored, want: Want) -> Prepared:
        values = stored.tensors[MAIN_TENSOR].to(want.dtype, copy=True).contiguous()
        return Prepared(self.name, *stored.size, [values], stored.format)

    def matmul(self, x: Tensor, prepared: Prepared, bias: Tensor | None) -> Tensor:
        return product(x, bias, *prepared.tensors)

    def operator(self, prepared: Prepared) -> Operator | None:
        return Operator(product, ())

    def embed(self, ids: Tensor, prepared: Prepared) -> Tensor:
        check_ids(ids, prepared.rows)
        return prepared.tensors[0][ids].float()


def product(x: Tensor, bias: Tensor | None, weight: Tensor) -> Tensor:
    """[tokens, cols] -> [tokens, rows] in x.dtype, of whichever dtype holds both."""
    wider = torch.promote_types(x.dtype, weight.dtype)
    own = None if bias is None else bias.to(wider)
    return linear(x.to(wider), weight.to(wider), own).to(x.dtype)
