"""sweep: choose column after column, moving each column's error onto the columns still free.

The pass that GPTQ (Frantar et al., 2023, arXiv:2210.17323) and SparseGPT (Frantar & Alistarh, 2023,
arXiv:2301.00774) share: an exact optimal brain surgeon step per column, in one fixed order for all
rows. With H = mean of x x^T and U the upper Cholesky factor of its inverse (H^-1 = U^T U), column j
gets a value q_j; then e = (w_j - q_j) / U_jj and w_k -= e * U_jk for all k > j. Minimizes
||(W - Q) X||^2 greedily. What q_j is, is the caller's `Choice`.

U comes from one Cholesky factorization and one triangular inverse, never from H^-1 itself (flip H,
factor, flip back, invert), in float32 or better; damping adds `damping` * mean(diag H) and grows
tenfold until the factorization succeeds. An input that was never active in calibration has no
correlations: its error moves nowhere.

Needs calibration tokens, ideally several times the columns. Fails where H is far from full rank and
`damping` small: the error moves into directions calibration never saw.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from compress_methods.errors import CalibrationError, RecipeError

BLOCK = 128
ATTEMPTS = 6


@dataclass(frozen=True)
class Factor:
    """Order of the columns, U in that order, and diag H in the original order."""

    order: Tensor
    upper: Tensor
    diagonal: Tensor


class Choice(Protocol):
    """What a sweep asks: the values that columns get, all rows of a column at once."""

    @property
    def span(self) -> int:
        """Columns decided together, a divisor of 128; the order keeps them consecutive."""

    def begin(self, columns: Tensor, weights: Tensor, pivots: Tensor) -> None:
        """The next `span` columns: weights [span, rows] as they now are, U_jj [span, 1]."""

    def pick(self, column: int, weights: Tensor) -> Tensor:
        """Values [rows] for a column whose weights [rows] have come to be these."""


def activity_order(diagonal: Tensor, span: int = 1) -> Tensor:
    """Most active columns first, by diag H; every `span` neighbours stay together."""
    inside = torch.argsort(diagonal.reshape(-1, span), descending=True, stable=True)
    blocks = torch.argsort(diagonal.reshape(-1, span).sum(1), descending=True, stable=True)
    return (inside[blocks] + blocks[:, None] * span).flatten()


def factorize(hessian: Tensor, damping: float, order: Tensor) -> Factor:
    """U with (H + damping)^-1 = U^T U, columns in `order`; `hessian` [cols, cols] stays as it is.

    `CalibrationError` where no damping makes H positive definite.
    """
    diagonal = hessian.diagonal().clone()
    dead = diagonal <= 0
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


def sweep(weight: Tensor, factor: Factor, choice: Choice) -> None:
    """Have `choice` pick every column of `weight` [rows, cols] once, in lazy blocks of 128."""
    rows, cols = weight.shape
    left = weight.T[factor.order].contiguous()
    order = factor.order.tolist()
    for start in range(0, cols, BLOCK):
        end = min(start + BLOCK, cols)
        upper = factor.upper[start:end, start:end]
        pivots = upper.diagonal()[:, None]
        errors = torch.empty(end - start, rows, device=weight.device)
        for i in range(end - start):
            at, stop = start + i, start + i + choice.span
            if i % choice.span == 0:
                choice.begin(factor.order[at:stop], left[at:stop], pivots[i : i + choice.span])
            errors[i] = (left[at] - choice.pick(order[at], left[at])) / upper[i, i]
            left[at + 1 : end].addr_(upper[i, i + 1 :], errors[i], alpha=-1)
        left[end:].addmm_(factor.upper[start:end, end:].T, errors, alpha=-1)


def require_damping(damping: float) -> None:
    """`RecipeError` unless `damping` is a fraction that can be added to a Hessian."""
    if not 0 < damping <= 1:
        raise RecipeError(f"damping is {damping}, expected a number in (0, 1]")
