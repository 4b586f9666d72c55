"""gptq: round column after column, moving each column's error onto the columns not yet rounded.

GPTQ (Frantar et al., 2023, arXiv:2210.17323): the pass of `error_feedback.py`, where every column
becomes the nearest values its format holds.

Here: scales are fitted to the weights as they were, before any column moves (fitting each group
when it is reached, on weights that carry other columns' errors, was no better on a real model and
worse on random ones). `act_order` rounds columns of large diag H first; since scales are fixed
beforehand, no index tensor is stored. A sparse format keeps the largest weights, so that a model
with zeros keeps its pattern; what is lost there is made up for by the kept ones too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from compress_methods.algorithms.base import register_algorithm, require
from compress_methods.algorithms.error_feedback import (
    ErrorFeedback,
    Factor,
    activity_order,
    factorize,
)
from compress_methods.algorithms.statistics import Hessian, Seen
from compress_methods.formats import Format
from compress_methods.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


@register_algorithm
@dataclass(frozen=True)
class GPTQ(ErrorFeedback):
    """`act_order`: most active columns first; the rest as `ErrorFeedback` has it."""

    act_order: bool = True
    name: ClassVar[str] = "gptq"

    def check_format(self, fmt: Format) -> None:
        require(fmt.rounds, "gptq", fmt, "it needs one that rounds, such as integer")

    def prepare(self, seen: Seen, fmt: Format) -> Factor:
        hessian = Hessian.of(seen)
        order = torch.arange(len(hessian), device=hessian.device)
        if self.act_order:
            order = activity_order(hessian.diagonal(), fmt.span)
        return factorize(hessian, self.damping, order)

    def corrects(self, fmt: Format) -> bool:
        return super().corrects(fmt) and not fmt.prunes  # zeros are kept as they are

    def factor(self, prepared: Factor) -> Factor:
        return prepared

    def solve(self, weight: Tensor, prepared: Factor, fmt: Format) -> Any:
        mask = fmt.select(weight.abs()) if fmt.prunes else None
        rounder = fmt.rounder(weight, self.importance(prepared), mask)
        return self.round(weight, prepared, fmt, rounder)
