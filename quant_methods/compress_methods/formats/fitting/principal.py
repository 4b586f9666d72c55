"""The best few directions of a matrix, by what it does to a layer's outputs.

Of all A with r columns, A B comes closest to E in tr((E - A B) H (E - A B)^T) where A spans the r
leading eigenvectors U of E H E^T and B = U^T E. That is the SVD of E L with H = L L^T, its right
factor unwhitened (SVD-LLM, Wang et al., 2024, arXiv:2403.07378), without L or its inverse: H may be
singular. With H the identity it is the plain SVD (Eckart & Young, 1936).

U is found by subspace iteration with a few directions more than asked for, which misses little of
the energy however flat the spectrum is (Halko et al., 2011, arXiv:0909.4061); of matrices with
few rows it is exact.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress_methods.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

SPARE = 32
ITERATIONS = 8


def principal(matrix: Tensor, rank: int, hessian: Tensor | None = None) -> Tensor:
    """Orthonormal U [rows, rank] float32 of `matrix` [rows, cols]; columns of zeros where it has
    fewer rows. `hessian`: [cols, cols], its diagonal [cols], or None for the identity."""
    rows = len(matrix)
    width = min(rows, rank + SPARE)
    # Of any size, squares of it fit float32.
    unit = matrix / matrix.abs().amax().clamp_(min=torch.finfo(matrix.dtype).tiny)
    if width < rows:
        generator = torch.Generator().manual_seed(rank)
        basis = torch.randn(rows, width, generator=generator).to(matrix.device)
        for _ in range(ITERATIONS):
            basis = torch.linalg.qr(unit @ weighted(unit.T @ basis, hessian)).Q
    else:
        basis = torch.eye(rows, device=matrix.device)
    inside = basis.T @ unit
    energies = (inside @ weighted(inside.T, hessian)).double()
    found = torch.linalg.eigh(energies).eigenvectors.flip(1)[:, :rank].to(basis.dtype)
    return torch.nn.functional.pad(basis @ found, (0, rank - found.shape[1]))


def weighted(columns: Tensor, hessian: Tensor | None) -> Tensor:
    """H times [cols, n]."""
    if hessian is None:
        return columns
    return hessian @ columns if hessian.dim() == 2 else hessian[:, None] * columns
