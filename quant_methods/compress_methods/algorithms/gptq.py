"""gptq: round column after column, moving each column's error onto the columns not yet rounded.

GPTQ (Frantar et al., 2023, arXiv:2210.17323). With H = mean of x x^T and U the upper Cholesky
factor of its inverse (H^-1 = U^T U), for column j: e = (w_j - q_j) / U_jj; w_k -= e * U_jk for all
k > j. Minimizes ||(W - Q) X||^2 greedily.

Here: scales are fitted to the weights as they were, before any column moves (fitting each group
when it is reached, on weights that carry other columns' errors, was no better on a real model and
worse on random ones). U comes from one Cholesky factorization and one triangular inverse, never
from H^-1 itself (flip H, factor, flip back, invert), in float32 or better; damping adds `damping` *
mean(diag H) and grows tenfold until the factorization succeeds. `act_order` rounds columns of large
diag H first; since scales are fixed beforehand, no index tensor is stored. An input that was never
active in calibration is rounded to nearest: it has no correlations to use.

Needs calibration tokens, ideally several times the columns. Fails where H is far from full rank and
`damping` small: the error moves into directions calibration never saw.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compress_methods.algorithms.base import (
    Algorithm,
    Gathered,
    Hessian,
    Needs,
    register_algorithm,
    require,
)
from compress_methods.algorithms.clipping import search_scales
from compress_methods.errors import CalibrationError, RecipeError
from compress_methods.formats.base import Format
from compress_methods.formats.integer import Integer, IntegerSolution

BLOCK = 128
ATTEMPTS = 6


@dataclass(frozen=True)
class Factor:
    """Order of the columns, U in that order, and diag H in the original order."""

    order: Tensor
    upper: Tensor
    diagonal: Tensor


@register_algorithm
@dataclass(frozen=True)
class GPTQ(Algorithm):
    """`damping`: fraction of mean(diag H) added to it; `act_order`: most active columns first;
    `clip`: search each group's clipping range, weighted by diag H."""

    damping: float = 0.01
    act_order: bool = True
    clip: bool = False
    name: ClassVar[str] = "gptq"
    needs: ClassVar[Needs] = "hessian"

    def __post_init__(self) -> None:
        if not 0 < self.damping <= 1:
            raise RecipeError(f"damping is {self.damping}, expected a number in (0, 1]")

    def check_format(self, fmt: Format) -> None:
        require(isinstance(fmt, Integer), "gptq", fmt, "it needs integer")

    def prepare(self, gathered: Gathered) -> Factor:
        assert isinstance(gathered, Hessian)
        return factorize(gathered.mean(), self.damping, self.act_order)

    def solve(self, weight: Tensor, prepared: Factor, fmt: Format) -> IntegerSolution:
        assert isinstance(fmt, Integer)
        if self.clip:
            return sweep(weight, prepared, fmt, *search_scales(fmt, weight, prepared.diagonal))
        return sweep(weight, prepared, fmt, *fmt.fit(weight))


def factorize(hessian: Tensor, damping: float, act_order: bool) -> Factor:
    """U with (H + damping)^-1 = U^T U, columns ordered; `hessian` [cols, cols] is not changed."""
    diagonal = hessian.diagonal().clone()
    dead = diagonal <= 0
    order = torch.arange(len(diagonal), device=hessian.device)
    if act_order:
        order = torch.argsort(diagonal, descending=True, stable=True)
    flipped = order.flip(0)
    damped = hessian[flipped][:, flipped]
    mean = float(diagonal.mean()) or 1.0
    base = torch.where(dead, torch.full_like(diagonal, mean), diagonal)[flipped]
    for attempt in range(ATTEMPTS):
        damped.diagonal().copy_(base + damping * 10**attempt * mean)
        lower, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0:
            break
    else:
        raise CalibrationError(
            f"Hessian of {len(diagonal)} inputs is not positive definite even with damping "
            f"{damping * 10 ** (ATTEMPTS - 1):g}; calibration activations may overflow"
        )
    del damped
    identity = torch.eye(len(lower), device=lower.device)
    inverse = torch.linalg.solve_triangular(lower, identity, upper=False, out=identity)
    return Factor(order, inverse.flip(0, 1).contiguous(), diagonal)


def sweep(
    weight: Tensor, factor: Factor, fmt: Integer, scales: Tensor, zeros: Tensor | None
) -> IntegerSolution:
    """Round `weight` [rows, cols] to given scales, column by column, in lazy blocks of 128."""
    rows, cols = weight.shape
    group = cols if fmt.group_size < 0 else fmt.group_size
    grids = [
        (scales[:, g].float(), None if zeros is None else zeros[:, g].float())
        for g in range(scales.shape[1])
    ]
    left = weight.T[factor.order].contiguous()
    codes = torch.empty_like(left, dtype=torch.uint8)
    order = factor.order.tolist()
    for start in range(0, cols, BLOCK):
        end = min(start + BLOCK, cols)
        upper = factor.upper[start:end, start:end]
        errors = torch.empty(end - start, rows, device=weight.device)
        for i in range(end - start):
            grid = grids[order[start + i] // group]
            w = left[start + i]
            q = fmt.encode(w, *grid)
            codes[start + i] = q.to(torch.uint8)
            errors[i] = (w - fmt.decode(q, *grid)) / upper[i, i]
            left[start + i + 1 : end].addr_(upper[i, i + 1 :], errors[i], alpha=-1)
        left[end:].addmm_(factor.upper[start:end, end:].T, errors, alpha=-1)
    restored = torch.empty_like(codes)
    restored[factor.order] = codes
    return IntegerSolution(restored.T.contiguous(), scales, zeros)
