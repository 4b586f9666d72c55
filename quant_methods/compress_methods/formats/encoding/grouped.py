"""grouped: what formats share that store a scale for each group of columns, and codes of b bits.

A group is `group_size` consecutive columns, -1 meaning the whole row. Codes are packed in blocks of
columns, see `codes.py`: a group, or `ROW_BLOCK` columns where groups are smaller or whole rows.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from compress_methods.errors import FormatError
from compress_methods.formats.base import MAIN_TENSOR, Axis, Format, TensorSpec, torch_dtype

if TYPE_CHECKING:
    from torch import Tensor

SCALES = "weight_scales"
GROUP_SIZES = (-1, 32, 64, 128)
ROW_BLOCK = 32


class Scaled(Format):
    """Scales of groups of columns, whatever it is that they multiply."""

    @property
    @abstractmethod
    def group_size(self) -> int:
        """Columns that share a scale; -1: all of them."""

    @property
    def per_group(self) -> Axis | None:
        """How columns lie in tensors that have an entry a group."""
        return Axis(1, self.group_size) if self.group_size > 0 else None

    def groups(self, cols: int) -> int:
        return 1 if self.group_size < 0 else cols // self.group_size

    def scales_spec(self, rows: int, cols: int, dtype: str) -> TensorSpec:
        """Of a scale for every row and group."""
        return TensorSpec((rows, self.groups(cols)), dtype, Axis(0), self.per_group)

    @property
    def group_name(self) -> str:
        """A word for tables."""
        return "row" if self.group_size < 0 else f"g{self.group_size}"


class Grouped(Scaled):
    """Codes and scales, to which a format adds what its values need besides."""

    @property
    @abstractmethod
    def bits(self) -> int:
        """Of a code."""

    @property
    def searches_range(self) -> bool:
        return True

    def check_shape(self, rows: int, cols: int) -> None:
        if self.group_size > 0 and cols % self.group_size:
            raise FormatError(f"group_size {self.group_size} does not divide {cols} columns")
        if cols % ROW_BLOCK:
            raise FormatError(f"{cols} columns are no multiple of {ROW_BLOCK}")

    @property
    def block(self) -> int:
        """Columns per packing block."""
        return max(self.group_size, ROW_BLOCK)

    def codes_and_scales(self, rows: int, cols: int, scale_dtype: str) -> dict[str, TensorSpec]:
        """Their tensors, after `check_shape`."""
        self.check_shape(rows, cols)
        packed = Axis(1, self.block, self.block * self.bits // 8)
        return {
            MAIN_TENSOR: TensorSpec((rows, packed.entries(cols)), "uint8", Axis(0), packed),
            SCALES: self.scales_spec(rows, cols, scale_dtype),
        }


def spread(scales: Tensor, cols: int) -> Tensor:
    """[rows, groups] -> [rows, cols]."""
    return scales.repeat_interleave(cols // scales.shape[1], 1)


def stored_scales(scales: Tensor, dtype: str) -> Tensor:
    """Scales as they are stored; `FormatError` where they do not fit."""
    stored = scales.to(torch_dtype(dtype)).contiguous()
    if not stored.isfinite().all():
        raise FormatError(f"a scale does not fit {dtype}")
    return stored


def require_known(settings: Iterable[tuple[str, Any, Iterable[Any]]]) -> None:
    """`FormatError` for the first (key, value, valid values) whose value is not among them."""
    for key, value, valid in settings:
        if value not in valid:
            raise FormatError(f"{key} is {value!r}, expected one of {', '.join(map(str, valid))}")
