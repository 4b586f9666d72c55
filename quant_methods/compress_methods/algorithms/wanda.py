"""wanda: keep the weights that matter most times the size of their input.

Wanda (Sun et al., 2023, arXiv:2306.11695): of every m columns of a row the n with the largest
|w_ij| * ||x_j||_2 are kept, the norm being over all calibration tokens, and rounded to the nearest
value their format holds. Needs the norms alone, no Hessian. No weight is changed to make up for
those removed, so at 50% and more `sparsegpt` and `alps` lose much less.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from compress_methods.algorithms.base import (
    Algorithm,
    Gathered,
    InputNorms,
    Needs,
    register_algorithm,
    require,
)
from compress_methods.algorithms.choices import NEVER_ACTIVE
from compress_methods.formats.base import Format
from compress_methods.formats.sparse import Sparse, SparseSolution


@register_algorithm
@dataclass(frozen=True)
class Wanda(Algorithm):
    """No parameters."""

    name: ClassVar[str] = "wanda"
    needs: ClassVar[Needs] = "input_norms"

    def check_format(self, fmt: Format) -> None:
        require(isinstance(fmt, Sparse), "wanda", fmt, "it needs sparse")

    def prepare(self, gathered: Gathered, fmt: Format) -> Tensor:
        assert isinstance(gathered, InputNorms)
        return gathered.squares.sqrt().clamp_(min=NEVER_ACTIVE)

    def solve(self, weight: Tensor, prepared: Tensor, fmt: Format) -> SparseSolution:
        assert isinstance(fmt, Sparse)
        mask = fmt.select(weight.abs() * prepared)
        return SparseSolution(mask, fmt.values.nearest(fmt.compact(weight, mask)))
