"""A matrix, or a piece of one, in its stored tensors: it knows which rows and columns it is.

Tensors that have an axis of the matrix are cut along it; others (codebooks, tensor-train cores) are
whole in every piece, and the piece's place says what of them counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from compress_methods.formats.base import MAIN_TENSOR, Format, TensorSpec, narrow

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Range = tuple[int, int]


@dataclass(frozen=True)
class Stored:
    """Rows and columns [start, end) of a matrix of `shape`, as `format` stores them."""

    format: Format
    tensors: Mapping[str, Tensor]
    shape: tuple[int, int]
    rows: Range
    cols: Range

    @classmethod
    def whole(cls, fmt: Format, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Stored:
        """A matrix of which nothing is cut off."""
        return cls(fmt, tensors, shape, (0, shape[0]), (0, shape[1]))

    @property
    def size(self) -> tuple[int, int]:
        """[rows, cols] of this piece."""
        return self.rows[1] - self.rows[0], self.cols[1] - self.cols[0]

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """What the format declares for the whole matrix."""
        return self.format.tensors(*self.shape)

    @property
    def ordered(self) -> list[Tensor]:
        """The tensors in the order their format declares them in."""
        return [self.tensors[name] for name in self.specs]

    @property
    def device(self) -> torch.device:
        return self.tensors[MAIN_TENSOR].device

    @property
    def cuts_rows(self) -> bool:
        """Whether any tensor becomes smaller when rows are cut off."""
        return any(spec.rows_axis for spec in self.specs.values())

    @property
    def cuts_cols(self) -> bool:
        """The same of columns."""
        return any(spec.cols_axis for spec in self.specs.values())

    def to(self, device: torch.device) -> Stored:
        """The same on a device."""
        return replace(self, tensors={name: t.to(device) for name, t in self.tensors.items()})

    def nested(self, fmt: Format) -> Stored:
        """The same piece of a matrix that is stored inside this one, under its own names."""
        return self.nested_in(fmt, self.shape)

    def nested_in(self, fmt: Format, shape: tuple[int, int]) -> Stored:
        """The same of a matrix that has another shape."""
        names = fmt.tensors(*shape)
        tensors = {name: self.tensors[name] for name in names}
        return replace(self, format=fmt, tensors=tensors, shape=shape)

    def cut(self, rows: Range | None = None, cols: Range | None = None) -> Stored:
        """The piece of rows and columns [start, end), counted as in the whole matrix."""
        rows, cols = rows or self.rows, cols or self.cols
        if (rows, cols) == (self.rows, self.cols):
            return self
        out = {}
        for name, spec in self.specs.items():
            tensor = self.tensors[name]
            for axis, cut, held in (
                (spec.rows_axis, rows, self.rows),
                (spec.cols_axis, cols, self.cols),
            ):
                if axis is not None and cut != held:
                    inside = cut[0] - held[0], cut[1] - held[0]
                    what = f"{self.format.name} {name}"
                    tensor = narrow(tensor, axis, inside, held[1] - held[0], what)
            out[name] = tensor
        return replace(self, tensors=out, rows=rows, cols=cols)

    def values(self) -> Tensor:
        """[rows, cols] of this piece, float32."""
        values = self.format.unpack(self.tensors)
        if not self.cuts_rows:
            values = values[slice(*self.rows)]
        if not self.cuts_cols:
            values = values[:, slice(*self.cols)]
        rows, cols = self.size
        return values[:rows, :cols]
