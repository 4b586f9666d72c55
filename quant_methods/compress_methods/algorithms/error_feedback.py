"""error_feedback: choose column after column, moving each column's error onto those still free.

The pass that GPTQ (Frantar et al., 2023, arXiv:2210.17323) and SparseGPT (Frantar & Alistarh, 2023,
arXiv:2301.00774) share: an exact optimal brain surgeon step per column, in one fixed order for all
rows. With H = mean of x x^T and U the upper Cholesky factor of its inverse (H^-1 = U^T U), column j
gets a value q_j; then e = (w_j - q_j) / U_jj and w_k -= e * U_jk for all k > j. Minimizes
||(W - Q) X||^2 greedily. What q_j is, the format's `Rounder` decides.

U comes from one Cholesky factorization and one triangular inverse, never from H^-1 itself (flip H,
factor, flip back, invert), in float32 or better; damping adds `damping` * mean(diag H) and grows
tenfold until the factorization succeeds. An input that was never active in calibration has no
correlations: its error moves nowhere.

`target: outputs` does not round W but what the original's outputs ask for, given the inputs x~ that
the compressed model has (GPTAQ, Li et al., 2025, arXiv:2504.02692, and Qronos, Zhang et al., 2025,
arXiv:2505.11695, in closed form; the residual stream's part is ours):

  W* = W + (W E[(x - x~) x~^T] + E[(r - r~) x~^T]) (H + damping)^-1,   H = E[x~ x~^T]

x and r being the original's inputs and residual stream; r counts for matrices that add to it. So a
matrix makes up for what those before it have lost, which at 4 and 3 bits is a third of the loss.
Of few tokens the least squares are mostly noise: with t tokens per column t / (t + 8) of the
correction is applied, half at 8, all but a sixteenth at 128.

`loss_groups: G` gives each of G groups of neighbouring rows an H of its own, in which tokens count
by what the rows' outputs do to the model's predictions (GuidedQuant, Kim et al., 2025,
arXiv:2505.07004; see `conversion/passes/weighing.py`): G times the memory and time of H, and no H
that matrices share, such as q, k and v. The correction is of as much as the tokens that count tell.

Needs calibration tokens, ideally several times the columns. Fails where H is far from full rank and
`damping` small: the error moves into directions calibration never saw.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from compress_methods.algorithms.base import Algorithm
from compress_methods.algorithms.coordinate_descent import descend
from compress_methods.algorithms.statistics import Drift, Hessian, Missing, Seen, Statistic
from compress_methods.errors import CalibrationError, RecipeError
from compress_methods.formats import Format, Rounder
from compress_methods.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 128
ATTEMPTS = 6
TARGETS = ("outputs", "weights")
MOST_SWEEPS = 100
HALF_CORRECTED = 8.0
"""Calibration tokens per column at which half of what is missing is noise of that text."""
NEVER_ACTIVE = 1e-20
"""What an input that calibration never saw counts, so that some choice is made of it."""


@dataclass(frozen=True)
class Factor:
    """Order of the columns, U in that order; H and its diagonal in the original order, undamped."""

    order: Tensor
    upper: Tensor
    diagonal: Tensor
    hessian: Tensor

    def divide(self, matrix: Tensor) -> Tensor:
        """matrix [rows, cols] times the inverse of the damped H."""
        out = torch.empty_like(matrix)
        out[:, self.order] = (matrix[:, self.order] @ self.upper.T) @ self.upper
        return out


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
    mean = float(diagonal.mean()) or 1.0
    base = torch.where(dead, torch.full_like(diagonal, mean), diagonal)[flipped]
    for attempt in range(ATTEMPTS):
        lower = _permuted(hessian, flipped)
        lower.diagonal().copy_(base + damping * 10**attempt * mean)
        info = torch.empty((), dtype=torch.int32, device=lower.device)
        torch.linalg.cholesky_ex(lower, out=(lower, info))
        if int(info) == 0:
            break
    else:
        raise CalibrationError(
            f"Hessian of {len(diagonal)} inputs is not positive definite even with damping "
            f"{damping * 10 ** (ATTEMPTS - 1):g}; calibration activations may overflow"
        )
    inverse = torch.eye(len(lower), device=lower.device)
    torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
    upper = lower.T  # whose memory is free now
    for some in torch.arange(len(upper), device=upper.device).split(BLOCK):
        upper[some] = inverse[len(upper) - 1 - some].flip(1)
    return Factor(order, upper, diagonal, hessian)


def _permuted(matrix: Tensor, order: Tensor) -> Tensor:
    """matrix[order][:, order], column after column: as LAPACK wants what it overwrites."""
    laid = torch.empty_like(matrix)
    for columns, some in zip(laid.split(BLOCK), order.split(BLOCK), strict=True):
        columns.copy_(matrix[:, some][order].T)
    return laid.T


def error_feedback(weight: Tensor, factor: Factor, rounder: Rounder) -> None:
    """Have `rounder` pick every column of `weight` [rows, cols] once, in lazy blocks of 128."""
    rows, cols = weight.shape
    left = weight.T[factor.order].contiguous()
    order = factor.order.tolist()
    dead = (factor.diagonal <= 0)[factor.order]
    for start in range(0, cols, BLOCK):
        end = min(start + BLOCK, cols)
        upper = factor.upper[start:end, start:end]
        errors = torch.empty(end - start, rows, device=weight.device)
        for i in range(end - start):
            at, stop = start + i, start + i + rounder.span
            if rounder.span > 1 and i % rounder.span == 0:
                pivots = _pivots(upper.diagonal()[i : i + rounder.span], dead[at:stop])
                rounder.begin(factor.order[at:stop], left[at:stop], pivots)
            errors[i] = (left[at] - rounder.pick(order[at], left[at])) / upper[i, i]
            left[at + 1 : end].addr_(upper[i, i + 1 :], errors[i], alpha=-1)
        left[end:].addmm_(factor.upper[start:end, end:].T, errors, alpha=-1)


def _pivots(diagonal: Tensor, dead: Tensor) -> Tensor:
    """U_jj [span, 1]: an error divided by it, squared, is what it adds to the output's."""
    return torch.where(dead, diagonal / NEVER_ACTIVE**0.5, diagonal)[:, None]


@dataclass(frozen=True)
class ErrorFeedback(Algorithm):
    """What the algorithms that end in the pass share.

    `damping`: fraction of mean(diag H) added to it; `clip`: search the clipping range of each group
    of values, weighted by diag H; `target`: `outputs` of the original or its `weights`;
    `correction`: the part of what is missing that is made up for, None for as much as the text can
    tell; `sweeps`: of coordinate descent after the pass; `loss_groups`: of rows whose Hessian is
    weighted by the loss, 0 for one plain Hessian.
    """

    damping: float = 0.01
    clip: bool = False
    target: str = "outputs"
    correction: float | None = None
    sweeps: int = 3
    loss_groups: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.damping <= 1:
            raise RecipeError(f"damping is {self.damping}, expected a number in (0, 1]")
        if self.target not in TARGETS:
            raise RecipeError(f"target is {self.target!r}, expected {' or '.join(TARGETS)}")
        if self.correction is not None and not 0 <= self.correction <= 1:
            raise RecipeError(f"correction is {self.correction}, expected a number from 0 to 1")
        if not 0 <= self.sweeps <= MOST_SWEEPS:
            raise RecipeError(f"sweeps is {self.sweeps}, expected a number up to {MOST_SWEEPS}")
        if self.loss_groups < 0:
            raise RecipeError(f"loss_groups is {self.loss_groups}, expected 0 or more")

    def needs(self, fmt: Format) -> tuple[type[Statistic], ...]:
        return (Hessian, Drift) if self.corrects(fmt) else (Hessian,)

    def corrects(self, fmt: Format) -> bool:
        """Whether what was lost before a matrix is made up for by it."""
        return self.target == TARGETS[0] and self.correction != 0

    def missing(self, weight: Tensor, seen: Seen, fmt: Format) -> Missing | None:
        return cast(Drift, seen[Drift]).missing(weight) if Drift in seen else None

    def aim(self, weight: Tensor, prepared: Any, missing: Missing | None) -> Tensor:
        if missing is None:
            return weight
        found = self.factor(prepared).divide(missing.products)
        part = self.correction
        if part is None:
            tokens = missing.tokens / weight.shape[1]
            part = tokens / (tokens + HALF_CORRECTED)
        return found.mul_(part).add_(weight)

    @abstractmethod
    def factor(self, prepared: Any) -> Factor:
        """The factor among what `prepare` gave."""

    def importance(self, factor: Factor) -> Tensor | None:
        """What a rounder's range search weights columns by, if there is to be one."""
        return factor.diagonal if self.clip else None

    def round(self, weight: Tensor, factor: Factor, fmt: Format, rounder: Rounder) -> Any:
        """The solution that the pass and `sweeps` arrive at, from a fresh rounder of `fmt`."""
        error_feedback(weight, factor, rounder)
        solution = rounder.solution()
        if self.sweeps == 0:
            return solution
        return descend(weight, factor.hessian, self.damping, fmt, solution, self.sweeps)
