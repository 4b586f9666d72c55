"""padded: a matrix whose columns no group divides, stored with zeros after its last column.

The format `base` stores [rows, n], n the next multiple of `multiple` after `cols`; the product
takes inputs with as many zeros after them. Both are exact: what stands in the added columns is
multiplied by zero, whatever it is. 80 columns become 96 in groups of 32, a fifth more bytes.

With `parts` each of so many equal runs of columns has its own zeros after it, so that as many ranks
can share a matrix whose groups they would cut: 1,440 columns over 4 ranks are 360 each and become
384. Smaller groups are tried first: at 4 bits groups of 64 take 3% more bytes than those of 128 and
groups of 32 take 9%, they lose less than larger ones, and vLLM's own kernels on GPUs know them.

Algorithms know nothing of it: they are given the padded weight and statistics of padded inputs, in
which the added columns never occur (see `Format.inner`). A recipe's `on_unfit: pad` makes one for
each width that needs it. Tensor parallelism cuts between parts; a matrix of one part where it could
cut `base`, what is left over at the end staying with the last piece.

Needs a base that rounds, such as integer. Fails where: a base that prunes, whose counts the zeros
would take part in.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from compress_methods.errors import FormatError
from compress_methods.formats.base import Axis, Format, TensorSpec, register_format
from compress_methods.formats.wrappers.smaller_group import group_of
from compress_methods.formats.wrappers.turned import Turned
from compress_methods.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

MULTIPLES = (32, 64, 128)


@register_format
@dataclass(frozen=True)
class Padded(Turned):
    """`base`: a format that rounds, for the padded matrix of `cols` columns. Solutions are those of
    `base`."""

    base: Format
    cols: int
    multiple: int = 32
    parts: int = 1
    name: ClassVar[str] = "padded"

    def __post_init__(self) -> None:
        if self.multiple not in MULTIPLES:
            expected = ", ".join(map(str, MULTIPLES))
            raise FormatError(f"multiple is {self.multiple!r}, expected one of {expected}")
        if self.base.inner is not self.base or self.base.prunes or not self.base.rounds:
            raise FormatError(f"base is {self.base.name}, expected one that rounds like integer")
        if not isinstance(self.cols, int) or self.cols < 1:
            raise FormatError(f"cols is {self.cols!r}, expected the columns of the matrix")
        if not isinstance(self.parts, int) or self.parts < 1 or self.cols % self.parts:
            raise FormatError(f"parts is {self.parts!r}, expected a divisor of {self.cols} columns")

    @property
    def part(self) -> int:
        """Columns of a part."""
        return self.cols // self.parts

    def padded(self, cols: int) -> int:
        """Columns that `base` stores for so many: the last part's, or several whole parts'."""
        count = max(1, cols // self.part)
        return count * (-(-(cols // count) // self.multiple) * self.multiple)

    def check_shape(self, rows: int, cols: int) -> None:
        if cols != self.cols:
            raise FormatError(f"{cols} columns, expected {self.cols}")
        self.base.check_shape(rows, self.padded(cols))

    def tensors(self, rows: int, cols: int) -> dict[str, TensorSpec]:
        found = self.base.tensors(rows, self.padded(cols))
        if self.parts == 1:
            return found
        return {name: self._by_parts(spec) for name, spec in found.items()}

    def _by_parts(self, spec: TensorSpec) -> TensorSpec:
        axis = spec.cols_axis
        if axis is None:
            return spec
        step = axis.entries(self.padded(self.part))
        return replace(spec, cols_axis=Axis(axis.axis, self.part, step))

    def nearest(
        self, weight: Tensor, importance: Tensor | None = None, mask: Tensor | None = None
    ) -> Any:
        if importance is not None:
            importance = self.turn_inputs(importance)
        return self.base.nearest(self.turn(weight), importance)

    def turn(self, weight: Tensor) -> Tensor:
        return self.turn_inputs(weight)

    def turn_back(self, weight: Tensor) -> Tensor:
        """Of whole parts; where there is one, of any piece of it."""
        if self.parts == 1:
            return weight[..., : self.cols]
        by_part = weight.unflatten(-1, (-1, self.padded(self.part)))
        return by_part[..., : self.part].flatten(-2)

    def turn_inputs(self, x: Tensor) -> Tensor:
        return with_zeros(x, self.padded(x.shape[-1]), max(1, x.shape[-1] // self.part))

    def quantize_activations(self, x: Tensor) -> Tensor:
        padded = self.turn_inputs(x)
        treated = self.base.quantize_activations(padded)
        return x if treated is padded else self.turn_back(treated)

    @property
    def cut_by(self) -> str:
        return self.base.cut_by

    def describe(self) -> str:
        return f"{self.base.describe()}, padded"


def with_zeros(x: Tensor, cols: int, parts: int) -> Tensor:
    """Inputs [..., columns] of so many parts, with zeros after each: [..., cols]."""
    missing = cols - x.shape[-1]
    if parts == 1:
        return torch.nn.functional.pad(x, (0, missing))
    return torch.nn.functional.pad(x.unflatten(-1, (parts, -1)), (0, missing // parts)).flatten(-2)


def padded_formats(formats: Sequence[Format], cols: int, parts: int = 1) -> list[Format]:
    """Each of them with a matrix of `cols` columns padded as far as its group asks, the fewest
    added columns first; those that cannot be padded left out."""
    found: list[tuple[int, Format]] = []
    for fmt in formats:
        multiple = unit_of(fmt)
        with contextlib.suppress(FormatError):
            padded = Padded(fmt, cols, multiple, parts)
            found.append((padded.padded(cols), padded))
    return [fmt for _, fmt in sorted(found, key=lambda each: each[0])]


def unit_of(fmt: Format) -> int:
    """What the columns of a matrix have to be a multiple of."""
    return max(MULTIPLES[0], group_of(fmt))
