"""alps: find mask and weights together by ADMM, then refit the weights on the mask.

ALPS (Meng et al., 2024, arXiv:2406.07831). With H = mean of x x^T scaled to a unit diagonal and W^
the weights scaled likewise, minimize ||(W^ - W) X||^2 over W = D, D of n in every m:

  W <- (W^ H - V + rho D) (H + rho I)^-1
  D <- the n largest |W + V/rho| of every m
  V <- V + rho (W - D)

rho starts at 0.1 and every 3 steps grows by 1.3, 1.2 or 1.1, as the mask has changed by more than
10%, 0.5% or less of the kept weights; when it has not changed at all it is final. Then conjugate
gradients, preconditioned by diag H, bring the kept weights close to the least-squares optimum.
Values that are rounded are so after that, by GPTQ's pass on the final mask.

Here: H + rho I is inverted anew when rho changes, by Cholesky, which is cheaper than the paper's
eigendecomposition of H on CPUs, and well conditioned since rho is never below 0.1; rows are worked
through in slabs of bounded size, each with its own rho.

Loses much less than `sparsegpt`, at any sparsity; takes about ten times as long. Needs calibration
tokens, ideally several times the columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from compress_methods.algorithms.base import register_algorithm, require
from compress_methods.algorithms.error_feedback import (
    NEVER_ACTIVE,
    ErrorFeedback,
    Factor,
    activity_order,
    factorize,
)
from compress_methods.algorithms.statistics import Hessian, Seen
from compress_methods.errors import CalibrationError
from compress_methods.formats import Format
from compress_methods.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

RHO = 0.1
STEPS = 300
EVERY = 3
GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
REFITS = 10
TINY = 1e-30
SLAB_ELEMENTS = 2**22


@dataclass(frozen=True)
class Scaled:
    """Damped H scaled to a unit diagonal, the scale of each input, and the sweep's factor."""

    hessian: Tensor
    scale: Tensor
    factor: Factor


@register_algorithm
@dataclass(frozen=True)
class ALPS(ErrorFeedback):
    """Its parameters are `ErrorFeedback`'s."""

    name: ClassVar[str] = "alps"

    def check_format(self, fmt: Format) -> None:
        require(fmt.prunes, "alps", fmt, "it needs sparse")

    def prepare(self, seen: Seen, fmt: Format) -> Scaled:
        hessian = Hessian.of(seen)
        order = activity_order(hessian.diagonal(), fmt.span)
        factor = factorize(hessian, self.damping, order)
        return scale_hessian(hessian, self.damping, factor)

    def factor(self, prepared: Scaled) -> Factor:
        return prepared.factor

    def solve(self, weight: Tensor, prepared: Scaled, fmt: Format) -> Any:
        slabs = (weight * prepared.scale).split(max(1, SLAB_ELEMENTS // weight.shape[1]))
        masks, fitted = [], []
        for slab in slabs:
            mask, kept = split(slab, prepared.hessian, fmt)
            masks.append(mask)
            fitted.append(refit(slab, mask, kept, prepared.hessian))
        mask, values = torch.cat(masks), torch.cat(fitted).div_(prepared.scale)
        factor = prepared.factor
        if not fmt.rounds:
            return fmt.nearest(values, mask=mask)
        rounder = fmt.rounder(values, self.importance(factor), mask)
        return self.round(values, factor, fmt, rounder)


def scale_hessian(hessian: Tensor, damping: float, factor: Factor) -> Scaled:
    """Unit diagonal after damping; inputs that were never active count next to nothing."""
    diagonal = hessian.diagonal()
    added = damping * (float(diagonal.mean()) or 1.0)
    scale = torch.where(diagonal > 0, diagonal + added, added * NEVER_ACTIVE).sqrt_()
    scaled = hessian / scale / scale[:, None]
    scaled.diagonal().fill_(1.0)
    return Scaled(scaled, scale, factor)


def split(weight: Tensor, hessian: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    """Mask bool [rows, cols] and kept weights that ADMM ends with; H has a unit diagonal.

    `dual` is V/rho.
    """
    target = weight @ hessian
    kept, dual, rho = weight, torch.zeros_like(weight), RHO
    before = mask = fmt.select(weight.abs())
    inverse = invert(hessian, rho)
    for step in range(1, STEPS + 1):
        pulled = (kept - dual).mul_(rho).add_(target) @ inverse
        pulled += dual
        mask = fmt.select(pulled.abs())
        kept = pulled * mask
        dual = pulled.sub_(kept)
        if step % EVERY:
            continue
        changed = float((mask != before).sum()) / float(mask.sum())
        if changed == 0:
            break
        growth = next(factor for least, factor in GROWTH if changed >= least)
        before, rho = mask, rho * growth
        dual /= growth
        inverse = invert(hessian, rho)
    return mask, kept


def invert(hessian: Tensor, rho: float) -> Tensor:
    """(H + rho I)^-1 of a positive semidefinite H [cols, cols]; `CalibrationError` otherwise."""
    shifted = hessian.clone()
    shifted.diagonal().add_(rho)
    lower, info = torch.linalg.cholesky_ex(shifted)
    if int(info):
        raise CalibrationError(
            f"Hessian of {len(hessian)} inputs is not positive semidefinite; calibration "
            "activations may overflow"
        )
    return torch.cholesky_inverse(lower, out=shifted)


def refit(
    weight: Tensor, mask: Tensor, start: Tensor, hessian: Tensor, steps: int = REFITS
) -> Tensor:
    """Conjugate gradients from `start` towards the values on `mask` with the least output error.

    All [rows, cols], zero outside the mask; H has a unit diagonal. The error never grows.
    """
    values = start.clone()
    residual = ((weight - start) @ hessian).mul_(mask)
    direction = residual.clone()
    size = _squares(residual)
    for _ in range(steps):
        moved = (direction @ hessian).mul_(mask)
        step = size / torch.linalg.vecdot(direction, moved)[:, None].clamp_(min=TINY)
        values.addcmul_(step, direction)
        residual.addcmul_(step, moved, value=-1)
        size, last = _squares(residual), size
        direction.mul_(size / last.clamp(min=TINY)).add_(residual)
    return values


def _squares(matrix: Tensor) -> Tensor:
    return torch.linalg.vecdot(matrix, matrix)[:, None]
