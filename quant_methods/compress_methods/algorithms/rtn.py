"""rtn: round to nearest. Every value becomes the closest one its format can hold.

q = argmin_q |w - decode(q)|, each value on its own; with `clip`, after the search of
`formats/fitting/range_search.py` for each group's range. Needs no data and any format. At 8 bits
that is all there is to do; at 4 bits GPTQ loses less, at 3 and 2 bits much less.
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
class RoundToNearest(Algorithm):
    """`clip`: search each group's clipping range."""

    clip: bool = False
    name: ClassVar[str] = "rtn"

    def check_format(self, fmt: Format) -> None:
        require(
            not self.clip or fmt.searches_range, "rtn", fmt, "clip needs ranges, such as integer's"
        )

    def solve(self, weight: Tensor, prepared: Any, fmt: Format) -> Any:
        return fmt.nearest(weight, weight.new_ones(weight.shape[1]) if self.clip else None)
