"""magnitude: keep the largest weights.

Of every m columns of a row the n largest |w| are kept (Han et al., 2015, arXiv:1506.02626) and
rounded to the nearest value their format holds. Needs no data and takes no longer than reading the
model. Ignores that inputs differ in size and that kept weights could make up for removed ones:
above all at 50% and more, `wanda` loses less and `sparsegpt` and `alps` much less.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from compress_methods.algorithms.base import Algorithm, register_algorithm, require
from compress_methods.formats import Format

if TYPE_CHECKING:
    from torch import Tensor


@register_algorithm
@dataclass(frozen=True)
class Magnitude(Algorithm):
    """No parameters."""

    name: ClassVar[str] = "magnitude"

    def check_format(self, fmt: Format) -> None:
        require(fmt.prunes, "magnitude", fmt, "it needs sparse")

    def solve(self, weight: Tensor, prepared: Any, fmt: Format) -> Any:
        return fmt.nearest(weight)
