"""Clipping search: shrink each group's range when that lowers its squared error.

For every group, the shrink factor s from a fixed grid that minimizes sum_j h_j (w_j - q_s(w_j))^2,
h being the Hessian's diagonal where there is one (the error that reaches the output if columns
were independent), else 1. Helps round-to-nearest at 4 bits and below; a full search per group, no
iteration. Fails nowhere, costs `STEPS` roundings of the matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress_methods.formats.integer import Integer

STEPS = 40
SMALLEST = 0.4


def search_scales(
    fmt: Integer, weight: Tensor, importance: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Scales and zeros as `Integer.fit` gives, each group shrunk by its best factor.

    weight [rows, cols]; importance [cols] or None.
    """
    groups = fmt.groups(weight.shape[1])
    best_error = torch.full((weight.shape[0], groups), torch.inf, device=weight.device)
    best = torch.ones_like(best_error)
    for shrink in torch.linspace(1.0, SMALLEST, STEPS).tolist():
        values = fmt.values(fmt.round_to(weight, *fmt.fit(weight, shrink)))
        error = (weight - values).square_()
        if importance is not None:
            error *= importance
        error = error.reshape(len(weight), groups, -1).sum(-1)
        better = error < best_error
        best = torch.where(better, shrink, best)
        best_error = torch.where(better, error, best_error)
    return fmt.fit(weight, best)
