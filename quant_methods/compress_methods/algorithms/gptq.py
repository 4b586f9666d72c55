"""gptq: round column after column, moving each column's error onto the columns not yet rounded.

GPTQ (Frantar et al., 2023, arXiv:2210.17323): the pass of `sweep.py`, where every column becomes
the nearest codes of its group's scale.

Here: scales are fitted to the weights as they were, before any column moves (fitting each group
when it is reached, on weights that carry other columns' errors, was no better on a real model and
worse on random ones). `act_order` rounds columns of large diag H first; since scales are fixed
beforehand, no index tensor is stored. A sparse format keeps the largest weights, so that a model
with zeros keeps its pattern; what is lost there is made up for by the kept ones too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

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
from compress_methods.algorithms.choices import Pruning, Rounding, fit_grid
from compress_methods.algorithms.clipping import search_scales
from compress_methods.algorithms.sweep import (
    Factor,
    activity_order,
    factorize,
    require_damping,
    sweep,
)
from compress_methods.formats.base import Format
from compress_methods.formats.integer import Integer, IntegerSolution
from compress_methods.formats.sparse import Sparse


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
        require_damping(self.damping)

    def check_format(self, fmt: Format) -> None:
        values = fmt.values if isinstance(fmt, Sparse) else fmt
        require(isinstance(values, Integer), "gptq", fmt, "it needs integer")

    def prepare(self, gathered: Gathered, fmt: Format) -> Factor:
        assert isinstance(gathered, Hessian)
        hessian = gathered.mean()
        order = torch.arange(len(hessian), device=hessian.device)
        if self.act_order:
            order = activity_order(hessian.diagonal(), fmt.m if isinstance(fmt, Sparse) else 1)
        return factorize(hessian, self.damping, order)

    def solve(self, weight: Tensor, prepared: Factor, fmt: Format) -> Any:
        importance = prepared.diagonal if self.clip else None
        if isinstance(fmt, Sparse):
            mask = fmt.select(weight.abs())
            grid = fit_grid(fmt, weight, mask, importance)
            pruning = Pruning(fmt, weight, prepared, grid, mask)
            sweep(weight, prepared, pruning)
            return pruning.solution()
        assert isinstance(fmt, Integer)
        scales, zeros = search_scales(fmt, weight, importance) if self.clip else fmt.fit(weight)
        rounding = Rounding(fmt, weight, scales, zeros)
        sweep(weight, prepared, rounding)
        return IntegerSolution(rounding.codes.T.contiguous(), scales, zeros)
