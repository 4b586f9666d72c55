"""coordinate_descent: revise codes one column after another, then refit the scales, on the full H.

What an error-feedback pass leaves is greedy: a column's code is never seen again. With the others
fixed, the best value of column j is

  t_j = q_j + ((W - Q) H)_j / H_jj

and the code nearest to it can only lower tr((W - Q) H (W - Q)^T) (CDQuant, Nair & Suggala, 2024,
arXiv:2406.17542; the codes' half of LNQ, Kim et al., 2025, arXiv:2505.07004). A sweep visits every
column once. Before each, and at the end, scales become those of least squares for the codes there
are, where the format has any (`Format.refit`). H is damped as the pass damped it.

Needs a format whose solutions can be revised (`Format.revisor`); others come out as they went in.
A sweep takes as long as a pass, a refit as long as one matrix product with H. Ends early when no
code changes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compress_methods.formats import Format, Rounder
from compress_methods.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 128


def descend(
    weight: Tensor, hessian: Tensor, damping: float, fmt: Format, solution: Any, sweeps: int
) -> Any:
    """A solution of `fmt` closer to `weight` [rows, cols] than `solution`, by `hessian`, whose
    diagonal is damped meanwhile."""
    diagonal = hessian.diagonal()
    undamped = diagonal.clone()
    diagonal.add_(damping * (float(diagonal.mean()) or 1.0))
    try:
        return _descend(weight, hessian, fmt, solution, sweeps)
    finally:
        diagonal.copy_(undamped)


def _descend(weight: Tensor, damped: Tensor, fmt: Format, solution: Any, sweeps: int) -> Any:
    for _ in range(sweeps):
        solution = fmt.refit(solution, weight, damped)
        rounder = fmt.revisor(solution, weight.shape)
        if rounder is None:
            return solution
        if not _sweep(weight, damped, rounder, fmt.matrix(solution)):
            return solution
        solution = rounder.solution()
        del rounder  # its codes are as large as the matrix
    return fmt.refit(solution, weight, damped)


def _sweep(weight: Tensor, hessian: Tensor, rounder: Rounder, values: Tensor) -> bool:
    """Have `rounder` pick every column anew, given the `values` [rows, cols] that it starts from;
    says whether any has changed."""
    cols = weight.shape[1]
    pull = ((weight - values) @ hessian).T.contiguous()
    held = values.T.contiguous()
    pivots = hessian.diagonal()
    changed = False
    for start in range(0, cols, BLOCK):
        end = min(start + BLOCK, cols)
        inside = hessian[start:end, start:end]
        moves = torch.empty(end - start, len(weight), device=weight.device)
        for i, at in enumerate(range(start, end)):
            if rounder.span > 1 and at % rounder.span == 0:
                which = torch.arange(at, at + rounder.span, device=weight.device)
                stop = at + rounder.span
                rounder.begin(which, held[at:stop], pivots[at:stop, None].rsqrt())
            found = rounder.pick(at, held[at] + pull[at] / pivots[at])
            moves[i] = found - held[at]
            held[at] = found
            pull[start:end].addr_(inside[i], moves[i], alpha=-1)
        if bool(moves.any()):
            changed = True
            pull[end:].addmm_(hessian[start:end, end:].T, moves, alpha=-1)
    return changed
