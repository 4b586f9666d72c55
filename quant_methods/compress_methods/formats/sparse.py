"""sparse: exactly n of every m consecutive columns of a row kept, any other format storing them.

m in {4, 8, 16, 32, 64, 128}. 2:4 is what GPUs know; with m = 64 or 128 the choice is in practice
free, and still every block starts at a known place: no row pointers, and slices of rows or columns
are slices of the stored tensors. (Bitmask storage as in SparseGPT's and compressed-tensors'
`sparse-bitmask`, with the fixed count that those lack.)

Stored, for a [rows, cols] matrix:

  weight_mask    uint8 [rows, cols/8]  bit j of byte i set: column 8*i + j is kept
  and the tensors of format `values` for the kept columns [rows, cols*n/m], in order

A block with fewer than n values that are not zero keeps zeros to make n. Fails where: m does not
divide cols; a group or packing block of `values` does not divide cols*n/m.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import gcd
from typing import TYPE_CHECKING, Any, ClassVar

from compress_methods.errors import FormatError
from compress_methods.formats.base import Axis, Format, TensorSpec, register_format
from compress_methods.formats.dense import Dense
from compress_methods.formats.fitting.least_squares import Unscaled
from compress_methods.formats.relaxed import Relaxed
from compress_methods.formats.rounder import Grid, Rounder
from compress_methods.lazy import numpy, torch

if TYPE_CHECKING:
    from torch import Tensor

BLOCKS = (4, 8, 16, 32, 64, 128)
MASK = "weight_mask"
BYTE = 8


@dataclass(frozen=True)
class SparseSolution:
    """Kept places bool [rows, cols]; the value format's solution for them [rows, cols*n/m]."""

    mask: Tensor
    values: Any


@register_format
@dataclass(frozen=True)
class Sparse(Format):
    """n of every m columns, stored as `values`: any format that is not sparse itself."""

    n: int
    m: int
    values: Format
    name: ClassVar[str] = "sparse"

    def __post_init__(self) -> None:
        if self.m not in BLOCKS:
            raise FormatError(f"m is {self.m!r}, expected one of {', '.join(map(str, BLOCKS))}")
        if not 0 < self.n <= self.m:
            raise FormatError(f"n is {self.n!r}, expected 1 to {self.m}: n of every m are kept")
        if self.values.prunes:
            raise FormatError("values is sparse itself, expected a dense or integer format")
        if self.values.inner is not self.values:
            raise FormatError("values is rotated, expected a dense or integer format")
        if not self.values.holds_zero:
            raise FormatError(f"values is {self.values.describe()}, expected a format that holds 0")
        if not (self.values.rounds or isinstance(self.values, Dense)):
            raise FormatError(f"values is {self.values.name}, expected a dense or integer format")

    def kept(self, cols: int) -> int:
        """Columns stored for `cols` columns of the matrix."""
        return cols * self.n // self.m

    def check_shape(self, rows: int, cols: int) -> None:
        if cols % self.m or cols % BYTE:
            raise FormatError(f"m: {max(self.m, BYTE)} does not divide {cols} columns")
        try:
            self.values.check_shape(rows, self.kept(cols))
        except FormatError as problem:
            raise FormatError(f"{self.n} of {self.m} of {cols} columns: {problem}") from None

    def tensors(self, rows: int, cols: int) -> dict[str, TensorSpec]:
        self.check_shape(rows, cols)
        out = {
            name: TensorSpec(spec.shape, spec.dtype, spec.rows_axis, self._wide(spec.cols_axis))
            for name, spec in self.values.tensors(rows, self.kept(cols)).items()
        }
        unit = max(self.m, BYTE)
        by_byte = Axis(1, unit, unit // BYTE)
        out[MASK] = TensorSpec((rows, cols // BYTE), "uint8", Axis(0), by_byte)
        return out

    def _wide(self, axis: Axis | None) -> Axis | None:
        """An axis over kept columns as one over columns: whole blocks that fill whole units."""
        if axis is None:
            return None
        blocks = axis.unit // gcd(axis.unit, self.n)
        return Axis(axis.axis, blocks * self.m, blocks * self.n // axis.unit * axis.step)

    def select(self, scores: Tensor) -> Tensor:
        """bool [rows, cols]: the n highest `scores` of every block, the first of equals."""
        blocks = scores.unflatten(1, (-1, self.m))
        least = _ascending(blocks, self.m - self.n)
        kept = blocks >= least
        if int(kept.sum()) * self.m == kept.numel() * self.n:
            return kept.flatten(1)
        above, equal = blocks > least, blocks == least
        room = self.n - above.sum(-1, keepdim=True)
        return (above | (equal & (equal.cumsum(-1) <= room))).flatten(1)

    def compact(self, matrix: Tensor, mask: Tensor) -> Tensor:
        """The kept columns [rows, cols*n/m] of [rows, cols], in order."""
        return matrix[mask].reshape(len(matrix), self.kept(matrix.shape[1]))

    def expand(self, compacted: Tensor, mask: Tensor) -> Tensor:
        """[rows, cols] with `compacted` [rows, cols*n/m] where `mask` says, zero elsewhere."""
        out = torch.zeros(mask.shape, dtype=compacted.dtype, device=compacted.device)
        return out.masked_scatter_(mask, compacted)

    def nearest(
        self, weight: Tensor, importance: Tensor | None = None, mask: Tensor | None = None
    ) -> SparseSolution:
        """Without `mask` the n largest magnitudes of every block; each chosen by `values`."""
        mask = self.select(weight.abs()) if mask is None else mask
        kept = self.compact(weight, mask)
        return SparseSolution(mask, self.values.nearest(kept, self._spread(importance, mask)))

    def rounder(
        self, weight: Tensor, importance: Tensor | None = None, mask: Tensor | None = None
    ) -> Rounder:
        fitted = self.select(weight.abs()) if mask is None and self.rounds else mask
        kept = weight if fitted is None else self.compact(weight, fitted)
        spread = None if fitted is None else self._spread(importance, fitted)
        return SparseRounder(self, self.values.grid(kept, spread), weight, mask)

    def revisor(self, solution: SparseSolution, shape: tuple[int, ...]) -> Rounder | None:
        """With the places that are kept as they are."""
        grid = self.values.grid_of(solution.values)
        return None if grid is None else SparseRounder(self, grid, solution.mask, solution.mask)

    def unscaled(self, solution: SparseSolution) -> Unscaled | None:
        inner = self.values.unscaled(solution.values)
        if inner is None or inner.values.shape[1] // inner.scales.shape[1] % self.n:
            return None  # groups that end inside a block end elsewhere in every row
        return replace(inner, values=self.expand(inner.values, solution.mask))

    def rescaled(self, solution: SparseSolution, scales: Tensor) -> SparseSolution:
        return replace(solution, values=self.values.rescaled(solution.values, scales))

    def _spread(self, importance: Tensor | None, mask: Tensor) -> Tensor | None:
        """Importance of the kept columns [rows, cols*n/m]."""
        return None if importance is None else self.compact(importance.expand(mask.shape), mask)

    def relax(self, solution: SparseSolution, weight: Tensor) -> RelaxedSparse:
        return RelaxedSparse(self, solution, weight)

    @property
    def relaxes(self) -> bool:
        return self.values.relaxes

    @property
    def rounds(self) -> bool:
        return self.values.rounds

    @property
    def searches_range(self) -> bool:
        return self.values.searches_range

    @property
    def span(self) -> int:
        return self.m

    @property
    def prunes(self) -> bool:
        return True

    def unrounded(self) -> Sparse:
        return replace(self, values=self.values.unrounded())

    def pack(self, solution: SparseSolution) -> dict[str, Tensor]:
        self._check_mask(solution.mask)
        return {**self.values.pack(solution.values), MASK: pack_mask(solution.mask)}

    def mask(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """bool [rows, cols] of stored tensors; `FormatError` if a block keeps another count."""
        mask = unpack_mask(tensors[MASK])
        self._check_mask(mask)
        return mask

    def _check_mask(self, mask: Tensor) -> None:
        counts = mask.unflatten(1, (-1, self.m)).sum(-1)
        wrong = counts != self.n
        if wrong.any():
            row, block = wrong.nonzero()[0].tolist()
            raise FormatError(
                f"{MASK}: row {row} keeps {int(counts[row, block])} of columns "
                f"{block * self.m} to {(block + 1) * self.m - 1}, expected {self.n}"
            )

    def solution(self, tensors: Mapping[str, Tensor]) -> SparseSolution:
        return SparseSolution(self.mask(tensors), self.values.solution(tensors))

    def matrix(self, solution: SparseSolution) -> Tensor:
        return self.expand(self.values.matrix(solution.values), solution.mask)

    def quantize_activations(self, x: Tensor) -> Tensor:
        return self.values.quantize_activations(x)

    @property
    def sparsity(self) -> float:
        return 1 - self.n / self.m

    def describe(self) -> str:
        return f"{self.n}:{self.m} {self.values.describe()}"


class SparseRounder:
    """n of every m columns kept, each row its own, unless `mask` [rows, cols] says which.

    Kept values become those of `grid`, that of the value format over the kept columns; groups of
    scales lie over these, not over the matrix's.
    """

    def __init__(self, fmt: Sparse, grid: Grid, like: Tensor, mask: Tensor | None) -> None:
        self.fmt, self.grid = fmt, grid
        self.span = fmt.m
        self.free = mask is None
        by_column = like.T.shape
        self.mask = like.new_zeros(by_column, dtype=torch.bool) if mask is None else mask.T.clone()
        self.codes: Tensor | None = None
        self._first = 0
        self._ranks = self.mask

    def begin(self, columns: Tensor, weights: Tensor, pivots: Tensor) -> None:
        if self.free:
            self.mask[columns] = self.fmt.select((weights / pivots).square().T).T
        self._first = int(columns.min())
        inside = self.mask[self._first : self._first + self.span].cumsum(0) - 1
        self._ranks = self._first // self.fmt.m * self.fmt.n + inside.clamp_(min=0)

    def pick(self, column: int, weights: Tensor) -> Tensor:
        codes, values = self.grid.pick(self._ranks[column - self._first], weights)
        if self.codes is None:
            self.codes = codes.new_empty(self.mask.shape)
        self.codes[column] = codes
        return values * self.mask[column]

    def solution(self) -> SparseSolution:
        assert self.codes is not None
        mask = self.mask.T.contiguous()
        return SparseSolution(mask, self.grid.solution(self.fmt.compact(self.codes.T, mask)))


class RelaxedSparse(Relaxed):
    """The kept values relaxed as their format does; the mask stays."""

    def __init__(self, fmt: Sparse, solution: SparseSolution, weight: Tensor) -> None:
        self.fmt, self._mask = fmt, solution.mask
        self._kept = fmt.values.relax(solution.values, fmt.compact(weight, solution.mask))
        self.parameters, self.rates = self._kept.parameters, self._kept.rates

    def matrix(self, parameters: Mapping[str, Tensor]) -> Tensor:
        return self.fmt.expand(self._kept.matrix(parameters), self._mask)

    def whole(self, parameters: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return self._kept.whole(parameters)

    def hold(self, solution: SparseSolution) -> None:
        self._kept.hold(solution.values)

    def limit(self, parameters: Mapping[str, Tensor]) -> None:
        self._kept.limit(parameters)

    def move(self, steps: Mapping[str, Tensor]) -> None:
        self._kept.move(steps)

    def state(self) -> dict[str, Tensor]:
        return self._kept.state()

    def settle(self, share: float) -> None:
        self._kept.settle(share)

    def solution(self) -> SparseSolution:
        return SparseSolution(self._mask, self._kept.solution())


def _ascending(blocks: Tensor, index: int) -> Tensor:
    """The value at `index` of every sorted row [..., 1]."""
    if blocks.device.type != "cpu":
        return blocks.kthvalue(index + 1, -1, keepdim=True).values
    # numpy's is five times as fast on CPUs, and half of the time of `alps` hangs on it.
    found = numpy.partition(blocks.float().numpy(), index, axis=-1)
    return torch.from_numpy(found[..., index : index + 1])


def pack_mask(mask: Tensor) -> Tensor:
    """bool [rows, cols] -> uint8 [rows, cols/8], lowest bit first."""
    powers = 2 ** torch.arange(BYTE, dtype=torch.uint8, device=mask.device)
    return (mask.unflatten(1, (-1, BYTE)) * powers).sum(-1, dtype=torch.uint8)


def unpack_mask(packed: Tensor) -> Tensor:
    """Inverse of `pack_mask`."""
    powers = 2 ** torch.arange(BYTE, dtype=torch.uint8, device=packed.device)
    return (packed[..., None] & powers).ne(0).flatten(1)
