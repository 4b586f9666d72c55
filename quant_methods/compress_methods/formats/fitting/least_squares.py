"""Scales of least squares: the best multiples of codes that are already chosen.

A matrix of codes and scales is Q = s_g * c by groups of columns, linear in its scales. With the
codes c fixed, tr((W - Q) H (W - Q)^T) is least where for every row

  M s = b,   M_gg' = sum of c_j H_jk c_k over j in g, k in g'
             b_g   = sum of c_j (W H)_j over j in g

Rows whose error does not become smaller, once scales are rounded to their stored dtype, keep
them. Where few values can be stored, such as powers of two, rounding all at once would lose more
than it wins: there one group after another gets the value nearest to what is best for it,

  s_g + (sum of c_j ((W - Q) H)_j over j in g) / M_gg

which never makes the error larger.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress_methods.formats.fitting.table_search import whole_table
from compress_methods.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

RIDGE = 1e-6
BLOCK = 128
SLAB_ELEMENTS = 2**22


@dataclass(frozen=True)
class Unscaled:
    """What scales multiply: `values` [rows, cols] float32, and `scales` [rows, groups], each that
    of as many consecutive columns, in the dtype they are stored in. `nearest`: the values they can
    take that are nearest to others, where there are fewer than the dtype has."""

    values: Tensor
    scales: Tensor
    nearest: Callable[[Tensor], Tensor] | None = None


def refit_scales(unscaled: Unscaled, weight: Tensor, hessian: Tensor) -> Tensor:
    """Scales [rows, groups] that bring the product close to `weight` [rows, cols], measured by
    `hessian` [cols, cols]."""
    rows = max(1, SLAB_ELEMENTS // weight.shape[1])
    one = _refit if unscaled.nearest is None else _descend
    parts = [
        one(Unscaled(values, scales, unscaled.nearest), slab, hessian)
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


def _descend(unscaled: Unscaled, weight: Tensor, hessian: Tensor) -> Tensor:
    """One group after another, in lazy blocks of columns."""
    assert unscaled.nearest is not None
    values, scales = unscaled.values.float(), unscaled.scales.clone()
    cols, groups = values.shape[1], scales.shape[1]
    size = cols // groups
    pull = (weight - values * scales.float().repeat_interleave(size, 1)) @ hessian
    block = max(size, BLOCK // size * size)
    for start in range(0, cols, block):
        end = min(start + block, cols)
        moved = torch.zeros_like(values[:, start:end])
        for first in range(start, end, size):
            last = first + size
            codes, old = values[:, first:last], scales[:, first // size]
            curve = torch.linalg.vecdot(codes @ hessian[first:last, first:last], codes)
            wanted = old + torch.linalg.vecdot(pull[:, first:last], codes) / curve
            found = torch.where(wanted > 0, unscaled.nearest(wanted), old)
            step = (found - old)[:, None] * codes
            # Rounded as it is, the nearest value may be no nearer than the one there is.
            worse = (found - wanted).abs() >= (old - wanted).abs()
            step[worse] = 0
            scales[:, first // size] = torch.where(worse, old, found)
            moved[:, first - start : last - start] = step
            pull[:, start:end] -= step @ hessian[first:last, start:end]
        pull[:, end:] -= moved @ hessian[start:end, end:]
    return scales


def _error(scales: Tensor, gram: Tensor, target: Tensor) -> Tensor:
    """The squared error of every row, less that of no values at all."""
    quadratic = torch.einsum("rg,rgh,rh->r", scales, gram, scales)
    return quadratic - 2 * torch.linalg.vecdot(scales, target)


def refit_tables(
    codes: Tensor,
    scales: Tensor,
    table: Tensor,
    table_rows: int,
    weight: Tensor,
    hessian: Tensor,
    basis: Tensor | None = None,
) -> Tensor:
    """Tables int8 [tables, k] whose products scale * table[code] come close to `weight`.

    codes and scales [rows, cols]; `table` are those there are, each for `table_rows` rows. With
    `basis` [k, n] tables are sums of its columns. Takes k matrix products with `hessian`.
    """
    rows, cols = weight.shape
    count = table.shape[1]
    step = max(1, SLAB_ELEMENTS // (cols * count * table_rows)) * table_rows
    parts = []
    for first in range(0, rows, step):
        there = slice(first, first + step)
        which = torch.arange(count, device=codes.device)
        # [rows, k, cols]: what an entry of the table is multiplied by
        design = scales[there, None] * (codes[there, None] == which[:, None])
        moved = (design.flatten(0, 1) @ hessian).view_as(design)
        grams = _by_table(moved @ design.mT, table_rows)
        targets = _by_table((moved @ weight[there, :, None])[..., 0], table_rows)
        at = slice(first // table_rows, (first + step) // table_rows)
        parts.append(_refit_slab(table[at], grams, targets, basis))
    return torch.cat(parts)


def _by_table(x: Tensor, table_rows: int) -> Tensor:
    """Sums over the rows that share a table."""
    missing = -len(x) % table_rows
    padded = torch.cat([x, x.new_zeros(missing, *x.shape[1:])])
    return padded.unflatten(0, (-1, table_rows)).sum(1)


def _refit_slab(table: Tensor, gram: Tensor, target: Tensor, basis: Tensor | None) -> Tensor:
    inner, pull = gram, target
    if basis is not None:
        inner, pull = basis.T @ gram @ basis, target @ basis
    diagonal = inner.diagonal(dim1=1, dim2=2)
    ridge = RIDGE * diagonal.mean(1, keepdim=True) + torch.finfo(gram.dtype).tiny
    damped = inner + torch.diag_embed(ridge.expand_as(diagonal))
    solved, wrong = torch.linalg.solve_ex(damped, pull[..., None])
    found = whole_table(solved[..., 0].nan_to_num(), basis)
    if basis is None:  # an entry that no value has stays
        found = torch.where(diagonal == 0, table, found)
    better = _error(found.float(), gram, target) < _error(table.float(), gram, target)
    return torch.where(((wrong == 0) & better)[:, None], found, table)
