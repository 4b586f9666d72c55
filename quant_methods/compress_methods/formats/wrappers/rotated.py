"""rotated: a matrix stored in a basis in which no column and no row sticks out.

W = S_r H_r Q H_c S_c. Q is what the format `base` stores; H are orthonormal Walsh-Hadamard matrices
of blocks, S diagonals of signs that look random. A large weight, or a large input, becomes a little
of every place of its block, so that a group's scale is no longer set by one of them (incoherence:
QuIP#, Tseng et al., 2024, arXiv:2402.04396; QuaRot, Ashkboos et al., 2024, arXiv:2404.00456). At
run time both ends are undone by fast transforms: W x = S_r H_r (Q (H_c S_c x)).

Blocks are of `block` rows or columns from the first on; what is left over at the end is cut into
powers of two, the largest first (576 columns: four of 128, one of 64). Signs are the bits of a hash
of `seed`, the same in every block, others for rows than for columns. So nothing is stored but what
`base` stores, and cuts at multiples of `block` are clean: a piece is rotated as in the whole, and
q, k and v are as one matrix, whose input is turned once.

Algorithms know nothing of it: they are given the rotated weight, the statistics of the rotated
input and `base` (see `Format.inner`). An input that calibration never saw shares a block with
others, and is no longer told from them.

Fails where: a base that prunes (the zeros would not be the weight's); cuts for tensor parallelism
inside a block, which a smaller `block` can allow.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from compress_methods.errors import FormatError
from compress_methods.formats.base import Axis, Format, TensorSpec, register_format
from compress_methods.formats.wrappers.turned import Turned
from compress_methods.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

BLOCKS = (32, 64, 128, 256, 512)
INPUTS, OUTPUTS = "inputs", "outputs"


@register_format
@dataclass(frozen=True)
class Rotated(Turned):
    """`base`: a format that rounds, for the rotated matrix. Solutions are those of `base`."""

    base: Format
    block: int = 128
    seed: int = 0
    name: ClassVar[str] = "rotated"

    def __post_init__(self) -> None:
        if self.block not in BLOCKS:
            expected = ", ".join(map(str, BLOCKS))
            raise FormatError(f"block is {self.block!r}, expected one of {expected}")
        if self.base.inner is not self.base:
            raise FormatError("base is rotated itself, expected a format such as integer")
        if self.base.prunes or not self.base.rounds:
            raise FormatError(f"base is {self.base.name}, expected one that rounds like integer")

    def check_shape(self, rows: int, cols: int) -> None:
        self.base.check_shape(rows, cols)

    def tensors(self, rows: int, cols: int) -> dict[str, TensorSpec]:
        specs = self.base.tensors(rows, cols).items()
        return {
            name: replace(
                spec, rows_axis=self._cut(spec.rows_axis), cols_axis=self._cut(spec.cols_axis)
            )
            for name, spec in specs
        }

    def _cut(self, axis: Axis | None) -> Axis | None:
        """The same axis, cut at whole blocks only."""
        return None if axis is None else replace(axis, cuts=math.lcm(axis.every, self.block))

    def nearest(
        self, weight: Tensor, importance: Tensor | None = None, mask: Tensor | None = None
    ) -> Any:
        """Every value of the rotated matrix chosen on its own. Of the rotated inputs each matters
        as much as its block does on average, which is all that `importance` can tell."""
        if importance is not None:
            importance = _block_means(importance, self.block)
        return self.base.nearest(self.turn(weight), importance)

    def turn(self, weight: Tensor) -> Tensor:
        return self.turn_inputs(self.turned(weight, 0, OUTPUTS))

    def turn_back(self, weight: Tensor) -> Tensor:
        return self.turned_back(self.turned_back(weight, -1, INPUTS), 0, OUTPUTS)

    def turn_inputs(self, x: Tensor) -> Tensor:
        return self.turned(x, -1, INPUTS)

    def quantize_activations(self, x: Tensor) -> Tensor:
        """What `base` does to the rotated input, seen from outside."""
        turned = self.turn_inputs(x.float())
        treated = self.base.quantize_activations(turned)
        return x if treated is turned else self.turned_back(treated, -1, INPUTS).to(x.dtype)

    @property
    def cut_by(self) -> str:
        return f"block or {self.base.cut_by}"

    def describe(self) -> str:
        return f"rotated {self.base.describe()}"

    def signs(self, side: str) -> Tensor:
        """+1 or -1 for every place of a block, float32 [block]; `side` is `INPUTS` or `OUTPUTS`."""
        words = hashlib.shake_256(f"{self.seed} {side}".encode()).digest(self.block // 8)
        bits = [byte >> place & 1 for byte in words for place in range(8)]
        return 1 - 2 * torch.tensor(bits, dtype=torch.float32)

    def turned(self, x: Tensor, dim: int, side: str) -> Tensor:
        """H S x along a dimension."""
        return hadamard(x * self._signs_along(x, dim, side), dim, self.block)

    def turned_back(self, x: Tensor, dim: int, side: str) -> Tensor:
        """S H x along a dimension, the inverse of `turned`."""
        return hadamard(x, dim, self.block) * self._signs_along(x, dim, side)

    def _signs_along(self, x: Tensor, dim: int, side: str) -> Tensor:
        size = x.shape[dim]
        signs = self.signs(side).to(x.device)
        # What is left over has the first signs of a block, wherever its own blocks begin.
        along = signs.repeat(-(-size // self.block))[:size] if size else signs[:0]
        return along if dim % x.dim() == x.dim() - 1 else along[:, None]


def blocks_of(size: int, block: int) -> Iterator[tuple[int, int, int]]:
    """(first, last, length of each block) of runs of equal blocks that together make `size`."""
    whole = size // block * block
    if whole:
        yield 0, whole, block
    first, left = whole, size - whole
    while left:
        length = 1 << (left.bit_length() - 1)
        yield first, first + length, length
        first, left = first + length, left - length


def hadamard(x: Tensor, dim: int, block: int) -> Tensor:
    """Orthonormal Walsh-Hadamard transform of every block along a dimension; its own inverse.

    By sums and differences of pairs alone, so that bits do not depend on the shape.
    """
    runs = [
        _transform(x.narrow(dim, first, last - first), dim, length)
        for first, last, length in blocks_of(x.shape[dim], block)
    ]
    if not runs:
        return x
    return runs[0] if len(runs) == 1 else torch.cat(runs, dim)


def _transform(x: Tensor, dim: int, length: int) -> Tensor:
    """Blocks of one length, a power of two."""
    dim %= x.dim()
    distance = 1
    while distance < length:
        first, second = x.unflatten(dim, (-1, 2, distance)).unbind(dim + 1)
        x = torch.stack((first + second, first - second), dim + 1).flatten(dim, dim + 2)
        distance *= 2
    return x / math.sqrt(length)


def _block_means(x: Tensor, block: int) -> Tensor:
    """Every value of [..., cols] replaced with the mean of its block."""
    runs = [
        x[..., first:last].unflatten(-1, (-1, length)).mean(-1).repeat_interleave(length, -1)
        for first, last, length in blocks_of(x.shape[-1], block)
    ]
    return torch.cat(runs, -1)
