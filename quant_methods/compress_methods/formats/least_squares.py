"""Scales of least squares: the best multiples of codes that are already chosen.

A matrix of codes and scales is Q = s_g * c by groups of columns, linear in its scales. With the
codes c fixed, tr((W - Q) H (W - Q)^T) is least where for every row

  M s = b,   M_gg' = sum of c_j H_jk c_k over j in g, k in g'
             b_g   = sum of c_j (W H)_j over j in g

Rows whose error does not become smaller, once scales are rounded to their stored dtype, keep
them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress_methods.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

RIDGE = 1e-6
SLAB_ELEMENTS = 2**22


@dataclass(frozen=True)
class Unscaled:
    """What scales multiply: `values` [rows, cols] float32, and `scales` [rows, groups], each that
    of as many consecutive columns, in the dtype they are stored in."""

    values: Tensor
    scales: Tensor


def refit_scales(unscaled: Unscaled, weight: Tensor, hessian: Tensor) -> Tensor:
    """Scales [rows, groups] that bring the product close to `weight` [rows, cols], measured by
    `hessian` [cols, cols]."""
    rows = max(1, SLAB_ELEMENTS // weight.shape[1])
    parts = [
        _refit(Unscaled(values, scales), slab, hessian)
        for values, scales, slab in zip(
            unscaled.values.split(rows),
            unscaled.scales.split(rows),
            weight.split(rows),
            strict=True,
        )
    ]
    return torch.cat(parts)


def _refit(unscaled: Unscaled, weight: Tensor, hessian: Tensor) -> Tensor:
    rows, groups = unscaled.scales.shape
    values = unscaled.values.float()
    grouped = values.unflatten(1, (groups, -1))
    size = grouped.shape[2]
    gram = values.new_empty(rows, groups, groups)
    for g in range(groups):
        moved = values[:, g * size : (g + 1) * size] @ hessian[g * size : (g + 1) * size]
        gram[:, g] = (moved.unflatten(1, (groups, -1)) * grouped).sum(-1)
    target = ((weight @ hessian).unflatten(1, (groups, -1)) * grouped).sum(-1)
    diagonal = gram.diagonal(dim1=1, dim2=2)
    diagonal += RIDGE * diagonal.mean(1, keepdim=True) + torch.finfo(gram.dtype).tiny
    solved, wrong = torch.linalg.solve_ex(gram, target[..., None])
    found = solved[..., 0].to(unscaled.scales.dtype)
    good = (wrong == 0) & found.isfinite().all(1) & (found != 0).all(1)
    old, new = unscaled.scales.float(), found.float()
    better = _error(new, gram, target) < _error(old, gram, target)
    return torch.where((good & better)[:, None], found, unscaled.scales)


def _error(scales: Tensor, gram: Tensor, target: Tensor) -> Tensor:
    """The squared error of every row, less that of no values at all."""
    quadratic = torch.einsum("rg,rgh,rh->r", scales, gram, scales)
    return quadratic - 2 * torch.linalg.vecdot(scales, target)
