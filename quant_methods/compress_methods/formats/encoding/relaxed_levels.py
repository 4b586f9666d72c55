"""Codes that stand for the values of a table, as something that gradients can move.

A place among the table's ascending values is what moves; between two of them it stands for a value
on the line between. So the loss falls as fast as the next value is far, and a place that is rounded
is at one of the values. Tables stay as they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress_methods.formats.encoding.codes import chosen
from compress_methods.formats.relaxed import RelaxedCodes
from compress_methods.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

TINY = 1e-30


class RelaxedLevels(RelaxedCodes):
    """Parameter `codes` [rows, cols] counts places in `levels` float32 [rows or 1, k], which
    ascend; `stored` uint8 like them are the codes of these values."""

    def __init__(
        self, levels: Tensor, stored: Tensor, values: Tensor, scales: Tensor | None
    ) -> None:
        """`values` [rows, cols] are what places are to stand for."""
        self._levels, self._stored = levels.contiguous(), stored
        super().__init__(self._places(values), levels.shape[1] - 1, scales)

    def _places(self, values: Tensor) -> Tensor:
        """Places of values, not whole; float32."""
        ascending = self._levels[0] if len(self._levels) == 1 else self._levels
        low = torch.searchsorted(ascending, values.contiguous(), right=True) - 1
        low.clamp_(0, self._levels.shape[1] - 2)
        start, step = self._line(low)
        return low + ((values - start) / step.clamp(min=TINY)).clamp_(0, 1)

    def _line(self, low: Tensor) -> tuple[Tensor, Tensor]:
        """The values at whole places, and how far the next ones are."""
        start = chosen(self._levels, low)
        return start, chosen(self._levels, low + 1) - start

    def values(self, places: Tensor) -> Tensor:
        """What places stand for, differentiable in them."""
        low = places.detach().floor().clamp_(0, self._top - 1)
        start, step = self._line(low)
        return start + (places - low) * step

    def codes(self) -> Tensor:
        """uint8 [rows, cols] of the places nearest to the parameter's."""
        return chosen(self._stored, self.parameters["codes"].round())

    def hold_values(self, values: Tensor) -> None:
        """Bring places to where they are rounded to those of `values`, which are in the table."""
        self.hold_codes(self._places(values).round_())


def distinct(values: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Ascending values [1, k] and their codes, of values [n] the first of those that are equal."""
    ascending, order = values.sort(stable=True)
    kept = torch.ones_like(ascending, dtype=torch.bool)
    kept[1:] = ascending[1:] != ascending[:-1]
    return ascending[kept][None], codes[order[kept]][None]
