"""choices: what a sweep makes of columns: rounded, or n of every m kept and those rounded.

`Rounding` is GPTQ's choice, `Pruning` SparseGPT's: of every m columns each row keeps the n whose
removal would cost most, w^2 / U_jj^2, as the weights are when the sweep arrives. Where the stored
values are integers, the kept ones are rounded as they are chosen, so that later columns make up for
both errors at once. Groups of scales lie over the kept columns, not over those of the matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress_methods.algorithms.clipping import search_scales
from compress_methods.algorithms.sweep import Factor
from compress_methods.formats.integer import Integer, IntegerSolution
from compress_methods.formats.sparse import Sparse, SparseSolution

NEVER_ACTIVE = 1e-20


class Rounding:
    """Every column to the nearest codes, uint8 [cols, rows], of scales that are given."""

    span = 1

    def __init__(self, fmt: Integer, weight: Tensor, scales: Tensor, zeros: Tensor | None) -> None:
        rows, cols = weight.shape
        self.fmt = fmt
        self.group = cols if fmt.group_size < 0 else fmt.group_size
        self.grids = [
            (scales[:, g].float(), None if zeros is None else zeros[:, g].float())
            for g in range(scales.shape[1])
        ]
        self.codes = torch.empty(cols, rows, dtype=torch.uint8, device=weight.device)

    def begin(self, columns: Tensor, weights: Tensor, pivots: Tensor) -> None:
        """Nothing to decide for several columns together."""

    def pick(self, column: int, weights: Tensor) -> Tensor:
        grid = self.grids[column // self.group]
        codes = self.fmt.encode(weights, *grid)
        self.codes[column] = codes.to(torch.uint8)
        return self.fmt.decode(codes, *grid)


@dataclass(frozen=True)
class Grid:
    """Scales, and zeros where there are any, of kept columns: [rows, groups]."""

    fmt: Integer
    scales: Tensor
    zeros: Tensor | None

    def at(self, ranks: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scales and zeros [columns, rows] for columns of those ranks among the kept ones."""
        last = self.scales.shape[1] - 1
        group = self.fmt.group_size
        groups = torch.zeros_like(ranks) if group < 0 else (ranks // group).clamp_(0, last)
        zeros = None if self.zeros is None else self.zeros.T.float().gather(0, groups)
        return self.scales.T.float().gather(0, groups), zeros


class Pruning:
    """n of every m columns kept, each row its own, unless `mask` [rows, cols] says which.

    With `grid` kept values become its codes; without, they stay as they are.
    """

    def __init__(
        self,
        fmt: Sparse,
        weight: Tensor,
        factor: Factor,
        grid: Grid | None = None,
        mask: Tensor | None = None,
    ) -> None:
        self.fmt, self.grid = fmt, grid
        self.span = fmt.m
        self.dead = factor.diagonal <= 0
        self.free = mask is None
        by_column = weight.T.shape
        self.mask = (
            weight.new_zeros(by_column, dtype=torch.bool) if mask is None else mask.T.clone()
        )
        dtype = torch.float32 if grid is None else torch.uint8
        self.values = weight.new_empty(by_column, dtype=dtype)
        self._grids: dict[int, tuple[Tensor, Tensor | None]] = {}

    def begin(self, columns: Tensor, weights: Tensor, pivots: Tensor) -> None:
        if self.free:
            cost = (weights / pivots).square_()
            cost[self.dead[columns]] *= NEVER_ACTIVE
            self.mask[columns] = self.fmt.select(cost.T).T
        if self.grid is not None:
            first = int(columns.min())
            inside = self.mask[first : first + self.span].cumsum(0) - 1
            scales, zeros = self.grid.at(first // self.fmt.m * self.fmt.n + inside.clamp_(min=0))
            self._grids = {
                first + i: (scales[i], None if zeros is None else zeros[i])
                for i in range(self.span)
            }

    def pick(self, column: int, weights: Tensor) -> Tensor:
        if self.grid is None:
            self.values[column] = weights
            return weights * self.mask[column]
        codes = self.grid.fmt.encode(weights, *self._grids[column])
        self.values[column] = codes.to(torch.uint8)
        return self.grid.fmt.decode(codes, *self._grids[column]).mul_(self.mask[column])

    def solution(self) -> SparseSolution:
        """What the finished sweep chose."""
        mask = self.mask.T.contiguous()
        kept = self.fmt.compact(self.values.T, mask)
        if self.grid is None:
            return SparseSolution(mask, self.fmt.values.nearest(kept))
        return SparseSolution(mask, IntegerSolution(kept, self.grid.scales, self.grid.zeros))


def fit_grid(
    fmt: Sparse, weight: Tensor, mask: Tensor, importance: Tensor | None = None
) -> Grid | None:
    """Scales fitted to the kept values of `weight` [rows, cols]; None unless they are integers.

    With `importance` [cols] each group's range is searched, see `clipping.py`.
    """
    if not isinstance(fmt.values, Integer):
        return None
    kept = fmt.compact(weight, mask)
    if importance is None:
        return Grid(fmt.values, *fmt.values.fit(kept))
    weights = fmt.compact(importance.expand_as(weight), mask)
    return Grid(fmt.values, *search_scales(fmt.values, kept, weights))
