"""Which input columns of a matrix to do without, and what the others become.

With H = mean of x x^T, the output error of a matrix without the columns D, all others free to make
up for it, is tr(W_D [(H^-1)_DD]^-1 W_D^T), reached by W - W_D [(H^-1)_DD]^-1 (H^-1)_D: least
squares on the columns that stay. Units of columns (a channel, or all of a KV group) go one after
another, the unit of least error first, many channels between two updates of H^-1, as in ZipLM
(Kurtic et al., 2023, arXiv:2302.04089). No bias is needed, so any model family can hold the result.

Without compensation a unit costs tr(W_D H_DD W_D^T), the activation importance of Wanda and
Minitron, and the columns that stay keep their values.

Damping adds a hundredth of mean(diag H) to the diagonal, which draws the kept columns towards their
old values, not towards zero. Needs calibration tokens, several times the columns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress_methods.errors import CalibrationError
from compress_methods.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

DAMPING = 0.01
ROUNDS = 32
ATTEMPTS = 6


def drop_units(
    weight: Tensor, hessian: Tensor, unit: int, kept: int, compensate: bool
) -> tuple[Tensor, Tensor]:
    """Keep `kept` units of `unit` consecutive columns of `weight` [rows, cols].

    Returns indices of the columns that stay, in order, and their new values [rows, kept * unit].
    """
    alive = weight.new_ones(weight.shape[1] // unit, dtype=torch.bool)
    values = weight
    if kept < len(alive):
        if compensate:
            values = _sweep(weight.clone(), _inverse(hessian), unit, kept, alive)
        else:
            cost = _costs(weight, _diagonal(hessian, unit))
            alive[cost.argsort(stable=True)[: len(alive) - kept]] = False
    columns = _columns(alive.nonzero().flatten(), unit)
    return columns, values[:, columns]


def _sweep(weight: Tensor, inverse: Tensor, unit: int, kept: int, alive: Tensor) -> Tensor:
    """Drop units and refit the rest until `kept` are left in `alive`; all arguments change."""
    excess = len(alive) - kept
    step = 1 if unit > 1 else -(-excess // ROUNDS)
    while excess:
        cost = _costs(weight, torch.linalg.inv(_diagonal(inverse, unit)))
        cost[~alive] = torch.inf
        units = cost.argsort(stable=True)[: min(step, excess)]
        alive[units] = False
        excess -= len(units)
        columns = _columns(units, unit)
        share = torch.linalg.solve(inverse[columns][:, columns], inverse[columns])
        weight.addmm_(weight[:, columns], share, alpha=-1)
        inverse.addmm_(inverse[:, columns], share, alpha=-1)
        inverse[columns, columns] = 1  # keeps what is gone invertible; the rest of it is zero
    return weight


def _columns(units: Tensor, unit: int) -> Tensor:
    return (units[:, None] * unit + torch.arange(unit, device=units.device)).flatten()


def _diagonal(matrix: Tensor, unit: int) -> Tensor:
    """The [units, unit, unit] blocks on the diagonal of [cols, cols]."""
    index = torch.arange(len(matrix) // unit, device=matrix.device)
    return matrix.unflatten(0, (-1, unit)).unflatten(2, (-1, unit))[index, :, index]


def _costs(weight: Tensor, blocks: Tensor) -> Tensor:
    """tr(W_u B_u W_u^T) of every unit u: [units]."""
    parts = weight.unflatten(1, (len(blocks), -1)).transpose(0, 1)
    return ((parts @ blocks) * parts).sum((1, 2))


def _inverse(hessian: Tensor) -> Tensor:
    """(H + DAMPING * mean)^-1, the damping growing tenfold until H is positive definite."""
    damped = hessian.clone()
    mean = float(hessian.diagonal().mean()) or 1.0
    for attempt in range(ATTEMPTS):
        damped.diagonal().copy_(hessian.diagonal() + DAMPING * 10**attempt * mean)
        lower, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0:
            return torch.cholesky_inverse(lower)
    raise CalibrationError(
        f"Hessian of {len(hessian)} inputs is not positive definite even with damping "
        f"{DAMPING * 10 ** (ATTEMPTS - 1):g}; calibration activations may overflow"
    )
