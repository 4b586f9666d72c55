"""rtn: round to nearest. Every value becomes the closest one its format can hold.

q = argmin_q |w - decode(q)|, each value on its own; with `clip`, after the search of
`clipping.py` for each group's range. Needs no data and any format. At 8 bits that is all there is
to do; at 4 bits GPTQ loses less, at 3 and 2 bits much less.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from compress_methods.algorithms.base import Algorithm, register_algorithm, require
from compress_methods.algorithms.clipping import search_scales
from compress_methods.formats.base import Format
from compress_methods.formats.integer import Integer


@register_algorithm
@dataclass(frozen=True)
class RoundToNearest(Algorithm):
    """`clip`: search each group's clipping range (integer formats)."""

    clip: bool = False
    name: ClassVar[str] = "rtn"

    def check_format(self, fmt: Format) -> None:
        require(not self.clip or isinstance(fmt, Integer), "rtn", fmt, "clip needs integer")

    def solve(self, weight: Tensor, prepared: Any, fmt: Format) -> Any:
        if not self.clip:
            return fmt.nearest(weight)
        assert isinstance(fmt, Integer)
        return fmt.round_to(weight, *search_scales(fmt, weight))
