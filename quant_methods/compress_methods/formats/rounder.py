"""What an error-feedback pass asks of a format: the values of one column after another.

A `Grid` is the set of values each place of a matrix can take, fitted beforehand: scales, tables. A
`Rounder` makes a solution of it while the pass moves over the columns. Formats that round every
value on its own declare a grid and get their rounder from it; formats that decide several columns
together (n:m sparsity, vector codes) bring a rounder of their own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from compress_methods.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


class Grid(Protocol):
    """Values that a [rows, cols] matrix can take."""

    def pick(self, column: int | Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and values [rows] closest to `weights` [rows].

        `column` is one for all rows, or int64 [rows] where rows have kept other columns.
        """

    def solution(self, codes: Tensor) -> Any:
        """The format's solution of codes [rows, cols]."""


def entries_at(by_group: Tensor, column: int | Tensor, group_size: int) -> Tensor:
    """The entries [rows] of [groups, rows] that belong to a column, or to each row's column.

    `group_size` columns have an entry, all of them where it is negative.
    """
    if isinstance(column, int):
        return by_group[0 if group_size < 0 else column // group_size]
    groups = torch.zeros_like(column) if group_size < 0 else column // group_size
    return by_group.gather(0, groups.clamp_(0, len(by_group) - 1)[None])[0]


class Rounder(Protocol):
    """Chooses the values of columns as an error-feedback pass arrives at them."""

    @property
    def span(self) -> int:
        """Columns decided together, a divisor of 128; the pass keeps them consecutive."""

    def begin(self, columns: Tensor, weights: Tensor, pivots: Tensor) -> None:
        """The next `span` columns, if more than one, before they are picked.

        weights [span, rows] as they now are; pivots [span, 1]: the square of (error / pivot) is
        what an error adds to the output's after later columns have made up for it.
        """

    def pick(self, column: int, weights: Tensor) -> Tensor:
        """Values [rows] for a column whose weights [rows] have come to be these."""

    def solution(self) -> Any:
        """The format's solution, once every column was picked."""


class ColumnRounder:
    """Every column to the nearest values of a grid."""

    span = 1

    def __init__(self, grid: Grid, shape: tuple[int, ...]) -> None:
        self._grid = grid
        self._rows, self._cols = shape
        self._codes: Tensor | None = None

    def begin(self, columns: Tensor, weights: Tensor, pivots: Tensor) -> None:
        """Nothing to decide for several columns together."""

    def pick(self, column: int, weights: Tensor) -> Tensor:
        codes, values = self._grid.pick(column, weights)
        if self._codes is None:
            self._codes = codes.new_empty(self._cols, self._rows)
        self._codes[column] = codes
        return values

    def solution(self) -> Any:
        assert self._codes is not None
        return self._grid.solution(self._codes.T.contiguous())
