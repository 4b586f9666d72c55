"""Orthogonal matrices that spread every channel over all others, applied without being built.

For n = m 2^k channels, m odd: Q = D (O x H), D random signs, O a random orthogonal [m, m], H the
Walsh-Hadamard matrix of 2^k, whose entries are all of one size. One outlier becomes n channels of
an n-th of its energy (up to O's unevenness).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress_methods.formats.wrappers.rotated import hadamard
from compress_methods.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

AT_ONCE = 2**24


class Orthogonal:
    """Q [size, size] of a seed: the same on every machine, in float64."""

    def __init__(self, size: int, seed: int = 0) -> None:
        self.power = size & -size
        self.odd = size // self.power
        draw = torch.Generator().manual_seed(seed)
        self.signs = torch.randint(0, 2, (size,), generator=draw).double() * 2 - 1
        normal = torch.randn(self.odd, self.odd, generator=draw, dtype=torch.float64)
        self.mix = torch.linalg.qr(normal).Q if self.odd > 1 else torch.ones(1, 1).double()

    def turn(self, x: Tensor) -> Tensor:
        """x Q for x [..., size], in x's dtype."""
        if x.dim() > 1 and len(x) > 1 and x.numel() > AT_ONCE:  # a token table, say
            rows = max(1, AT_ONCE // (x.numel() // len(x)))
            return torch.cat([self.turn(piece) for piece in x.split(rows)])
        mixed = self._mixed(x.double() * self.signs.to(x.device), self.mix)
        return mixed.to(x.dtype)

    def turn_back(self, x: Tensor) -> Tensor:
        """x Q^T."""
        return (self._mixed(x.double(), self.mix.T) * self.signs.to(x.device)).to(x.dtype)

    def _mixed(self, x: Tensor, mix: Tensor) -> Tensor:
        parts = x.unflatten(-1, (self.odd, self.power))
        if self.odd > 1:
            parts = torch.einsum("...op,oq->...qp", parts, mix.to(x.device))
        return hadamard(parts, -1, self.power).flatten(-2)
