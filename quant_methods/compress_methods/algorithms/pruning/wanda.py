"""wanda: keep the weights that matter most times the size of their input.

Wanda (Sun et al., 2023, arXiv:2306.11695): of every m columns of a row the n with the largest
|w_ij| * ||x_j||_2 are kept, the norm being over all calibration tokens, and rounded to the nearest
value their format holds. Needs the norms alone, no Hessian. No weight is changed to make up for
those removed, so at 50% and more `sparsegpt` and `alps` lose much less.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from compress_methods.algorithms.base import Algorithm, register_algorithm, require
from compress_methods.algorithms.error_feedback import NEVER_ACTIVE
from compress_methods.algorithms.statistics import InputNorms, Seen, Statistic
from compress_methods.formats import Format

if TYPE_CHECKING:
    from torch import Tensor


@register_algorithm
@dataclass(frozen=True)
class Wanda(Algorithm):
    """No parameters."""

    name: ClassVar[str] = "wanda"

    def needs(self, fmt: Format) -> tuple[type[Statistic], ...]:
        return (InputNorms,)

    def check_format(self, fmt: Format) -> None:
        require(fmt.prunes, "wanda", fmt, "it needs sparse")

    def prepare(self, seen: Seen, fmt: Format) -> Tensor:
        return InputNorms.of(seen).sqrt().clamp_(min=NEVER_ACTIVE)

    def solve(self, weight: Tensor, prepared: Tensor, fmt: Format) -> Any:
        return fmt.nearest(weight, mask=fmt.select(weight.abs() * prepared))
