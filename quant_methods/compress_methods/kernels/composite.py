"""Matrices made of others: side by side, and rows of zeros.

vLLM runs q, k and v as one layer. Where their formats let the stored tensors be joined they are one
matrix; where not, each keeps its own kernel and the outputs are joined. Never chosen by rank.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from compress_methods.formats import Stored
from compress_methods.kernels.base import (
    ZEROS,
    Kernel,
    Prepared,
    Want,
    check_ids,
    register_kernel,
)
from compress_methods.kernels.dispatch import SIDE_BY_SIDE, kernel


class _Made(Kernel):
    """Made of prepared matrices, not of a stored one."""

    def rank(self, stored: Stored, want: Want) -> int | None:
        return None

    def prepare(self, stored: Stored, want: Want) -> Prepared:
        raise NotImplementedError(f"{self.name} is made of prepared matrices")


@register_kernel
class SideBySide(_Made):
    """Outputs of the parts, one after another; a bias may end where padding begins."""

    name: ClassVar[str] = SIDE_BY_SIDE

    def matmul(self, x: Tensor, prepared: Prepared, bias: Tensor | None) -> Tensor:
        outputs, first = [], 0
        for part in prepared.parts:
            own = None
            if bias is not None and first < len(bias):
                own = bias[first : first + part.rows]
            outputs.append(kernel(part.kernel).matmul(x, part, own))
            first += part.rows
        return torch.cat(outputs, -1)

    def embed(self, ids: Tensor, prepared: Prepared) -> Tensor:
        """Of the first part: what follows is padding, which no id names."""
        first = prepared.parts[0]
        return kernel(first.kernel).embed(ids, first)


@register_kernel
class Zeros(_Made):
    """Outputs of zero, or the bias."""

    name: ClassVar[str] = ZEROS

    def matmul(self, x: Tensor, prepared: Prepared, bias: Tensor | None) -> Tensor:
        out = x.new_zeros(len(x), prepared.rows)
        return out if bias is None else out + bias

    def embed(self, ids: Tensor, prepared: Prepared) -> Tensor:
        check_ids(ids, prepared.rows)
        return torch.zeros(len(ids), prepared.cols, device=ids.device)
