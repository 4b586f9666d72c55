"""trellis: a weight is a window of bits that slides over its neighbours, value = scale * c[window].

b bits per weight choose among 2^L values, L = `state_bits`: a weight's window holds its own b bits
and the L - b that follow, so each bit counts in many weights, and those of 256 weights are chosen
together. That comes nearly as close as tables of long vectors would, with no table at all: of
normal weights 2 bits lose .074 of the mean square (L = 12), where single codes lose .118 and no
code less than .0625. Trellis-coded quantization (Marcellin & Fischer, 1990) with the bit-shift
trellis and a computed code as in QTIP (Tseng et al., 2024, arXiv:2406.11235); our code is made for
the 16-bit lanes of CPUs:

  h = (25173 * window + 13849) mod 2^16, of hexadecimal digits d0 (lowest) to d3
  c = 2 (d0 + d1) + 3 (d2 + d3) - 75

A sum of digits that look random looks normal, so weights should: wrap it in `rotated`. Weights of
16 rows and 16 columns are one sequence that bites its own tail. The Viterbi algorithm chooses it
(`viterbi.py`); an error-feedback pass hands over 16 columns at a time.

Stored, for a [rows, cols] matrix:

  weight_packed  uint8 [rows/16, cols/16 * 32b]  the bits of tile after tile, the first weight's in
                                                 the lowest of the first byte. Row by row; of a row
                                                 columns 0, 1, 4, 5, 8, 9, 12, 13, then the others
  weight_scales  [rows, groups] bfloat16         of `group_size` columns, -1: of the row

Pays where memory takes the time (a few tokens, GPUs at small batches): at 2 bits it loses less than
half of what single codes lose. Does not pay for prompts, where decoding is what takes the time, or
where there is room for 4 bits. Conversion takes 2^(L + 1) steps per weight.
Fails where: cols is no multiple of 16 and of the group; values that look nothing like normal ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from compress_methods.errors import FormatError
from compress_methods.formats.base import (
    MAIN_TENSOR,
    Axis,
    TensorSpec,
    register_format,
    torch_dtype,
)
from compress_methods.formats.encoding.grouped import (
    GROUP_SIZES,
    SCALES,
    Scaled,
    require_known,
    spread,
    stored_scales,
)
from compress_methods.formats.fitting.least_squares import Unscaled
from compress_methods.formats.fitting.table_search import over
from compress_methods.formats.fitting.viterbi import encode
from compress_methods.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

BITS = (2, 3, 4)
STATE_BITS = tuple(range(8, 17))
TILE = 16
PLACES = TILE * TILE
SCALE_DTYPE = "bfloat16"
FACTOR, ADDEND = 25173, 13849
MIDDLE = 75
SPREAD = math.sqrt((2 * 2 + 3 * 3) * 2 * (16**2 - 1) / 12)
"""Standard deviation of values whose digits are all equally likely."""
STRETCH = {2: 1.04, 3: 1.1, 4: 1.15}
"""How much wider values are spread than normal weights where those lose least."""


@dataclass(frozen=True)
class TrellisSolution:
    """Codes uint8 [rows, cols], rows padded to whole tiles; scales [rows, groups]."""

    codes: Tensor
    scales: Tensor


@register_format
@dataclass(frozen=True)
class Trellis(Scaled):
    """b bits per weight, windows of `state_bits`; weight-only."""

    bits: int = 2
    state_bits: int = 12
    group_size: int = -1
    name: ClassVar[str] = "trellis"

    def __post_init__(self) -> None:
        require_known(
            (
                ("bits", self.bits, BITS),
                ("state_bits", self.state_bits, STATE_BITS),
                ("group_size", self.group_size, GROUP_SIZES),
            )
        )

    def check_shape(self, rows: int, cols: int) -> None:
        unit = max(self.group_size, TILE)
        if cols % unit:
            raise FormatError(f"{cols} columns are no multiple of {unit}")

    def tensors(self, rows: int, cols: int) -> dict[str, TensorSpec]:
        self.check_shape(rows, cols)
        tiles, packed = Axis(0, TILE), Axis(1, TILE, PLACES * self.bits // 8)
        shape = (tiles.entries(rows), packed.entries(cols))
        scales = self.scales_spec(rows, cols, SCALE_DTYPE)
        return {MAIN_TENSOR: TensorSpec(shape, "uint8", tiles, packed), SCALES: scales}

    @property
    def span(self) -> int:
        return TILE

    @property
    def holds_zero(self) -> bool:
        return False

    def rounder(
        self, weight: Tensor, importance: Tensor | None = None, mask: Tensor | None = None
    ) -> TrellisRounder:
        return TrellisRounder(self, self.scales_of(weight), weight.shape)

    def nearest(
        self, weight: Tensor, importance: Tensor | None = None, mask: Tensor | None = None
    ) -> TrellisSolution:
        """The sequences closest to `weight` [rows, cols], errors weighted by `importance`."""
        scales = self.scales_of(weight)
        if importance is None:
            importance = torch.ones_like(weight)
        codes = self.encode(weight, importance, spread(scales.float(), weight.shape[1]))
        return TrellisSolution(codes, scales)

    def scales_of(self, weight: Tensor) -> Tensor:
        """Scales [rows, groups] at which the values are spread as the weights are, or a little
        more."""
        grouped = weight.unflatten(1, (self.groups(weight.shape[1]), -1))
        size = grouped.square().mean(-1).sqrt()
        scales = size * (STRETCH[self.bits] / SPREAD)
        return scales.to(torch_dtype(SCALE_DTYPE))

    def encode(self, weight: Tensor, importance: Tensor, scales: Tensor) -> Tensor:
        """Codes [padded rows, cols] for `weight` and `scales` [rows, cols]; `importance`, what
        squared errors count, broadcasts against them."""
        rows, cols = weight.shape
        missing = (0, 0, 0, -rows % TILE)
        targets, costs = (
            to_sequences(torch.nn.functional.pad(x, missing))
            for x in (over(weight, scales), importance * scales.square())
        )
        # A path is no other for that, and nothing of it overflows.
        costs = over(costs, costs.amax(1, keepdim=True))
        codes = encode(targets, costs, self.values(targets), self.bits)
        return from_sequences(codes, rows + missing[-1], cols)

    def values(self, like: Tensor) -> Tensor:
        """What every window stands for: float32 [2^L] where `like` is."""
        window = torch.arange(2**self.state_bits, device=like.device)
        hashed = window * FACTOR + ADDEND
        digits = [hashed >> 4 * place & 15 for place in range(4)]
        whole = 2 * (digits[0] + digits[1]) + 3 * (digits[2] + digits[3]) - MIDDLE
        return whole.float()

    def decode(self, codes: Tensor) -> Tensor:
        """Values of codes [padded rows, cols], not scaled."""
        sequences = to_sequences(codes).int()
        window = torch.zeros_like(sequences)
        for place in range(-(-self.state_bits // self.bits)):
            window |= sequences.roll(-place, 1) << self.bits * place
        window &= 2**self.state_bits - 1
        return from_sequences(self.values(codes)[window], *codes.shape)

    def matrix(self, solution: TrellisSolution) -> Tensor:
        values = self._unscaled_values(solution)
        return values * spread(solution.scales.float(), values.shape[1])

    def _unscaled_values(self, solution: TrellisSolution) -> Tensor:
        return self.decode(solution.codes)[: len(solution.scales)]

    def unscaled(self, solution: TrellisSolution) -> Unscaled:
        return Unscaled(self._unscaled_values(solution), solution.scales)

    def rescaled(self, solution: TrellisSolution, scales: Tensor) -> TrellisSolution:
        return replace(solution, scales=scales)

    def pack(self, solution: TrellisSolution) -> dict[str, Tensor]:
        scales = stored_scales(solution.scales, SCALE_DTYPE)
        rows = len(solution.codes) // TILE
        sequences = to_sequences(solution.codes)
        packed = _to_bytes(sequences, self.bits).reshape(rows, -1)
        return {MAIN_TENSOR: packed, SCALES: scales}

    def solution(self, tensors: Mapping[str, Tensor]) -> TrellisSolution:
        """Inverse of `pack`."""
        packed = tensors[MAIN_TENSOR]
        tiles = packed.reshape(-1, PLACES * self.bits // 8)
        rows = len(packed) * TILE
        cols = tiles.shape[0] // len(packed) * TILE
        codes = from_sequences(_to_codes(tiles, self.bits), rows, cols)
        return TrellisSolution(codes, tensors[SCALES])

    @property
    def cut_by(self) -> str:
        return "group_size or tiles of 16"

    def describe(self) -> str:
        return f"trellis{self.bits} {self.group_name}"


class TrellisRounder:
    """Tiles of 16 columns, each chosen when an error-feedback pass arrives at it."""

    span = TILE

    def __init__(self, fmt: Trellis, scales: Tensor, shape: tuple[int, ...]) -> None:
        self.fmt, self.scales = fmt, scales
        rows, cols = shape
        self.codes = torch.zeros(rows + -rows % TILE, cols, dtype=torch.uint8, device=scales.device)
        self._scales = spread(scales.float(), cols)
        self._first, self._values = 0, scales

    def begin(self, columns: Tensor, weights: Tensor, pivots: Tensor) -> None:
        order = columns.argsort()
        self._first = int(columns.min())
        there = slice(self._first, self._first + TILE)
        scales = self._scales[:, there]
        codes = self.fmt.encode(weights[order].T, pivots[order].T.square().reciprocal(), scales)
        self.codes[:, there] = codes
        self._values = (self.fmt.decode(codes)[: len(scales)] * scales).T

    def pick(self, column: int, weights: Tensor) -> Tensor:
        return self._values[column - self._first]

    def solution(self) -> TrellisSolution:
        return TrellisSolution(self.codes, self.scales)


def to_sequences(x: Tensor) -> Tensor:
    """[rows, cols], whole tiles, -> [tiles, 256] in the order of a tile's bits."""
    rows, cols = x.shape
    # Of a row: pairs of columns, every other pair first.
    parts = x.reshape(rows // TILE, TILE, cols // TILE, TILE // 4, 2, 2)
    return parts.permute(0, 2, 1, 4, 3, 5).reshape(-1, PLACES)


def from_sequences(x: Tensor, rows: int, cols: int) -> Tensor:
    """Inverse of `to_sequences`."""
    parts = x.reshape(rows // TILE, cols // TILE, TILE, 2, TILE // 4, 2)
    return parts.permute(0, 2, 1, 4, 3, 5).reshape(rows, cols)


def _to_bytes(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [n, 256] -> bytes [n, 32 bits], the first in the lowest bits."""
    places = torch.arange(bits, dtype=torch.uint8, device=codes.device)
    stream = (codes[..., None] >> places & 1).reshape(len(codes), -1, 8)
    by_bit = torch.arange(8, dtype=torch.uint8, device=codes.device)
    return (stream << by_bit).sum(-1, dtype=torch.uint8)


def _to_codes(packed: Tensor, bits: int) -> Tensor:
    """Inverse of `_to_bytes`."""
    by_bit = torch.arange(8, dtype=torch.uint8, device=packed.device)
    stream = (packed[..., None] >> by_bit & 1).reshape(len(packed), -1, bits)
    places = torch.arange(bits, dtype=torch.uint8, device=packed.device)
    return (stream << places).sum(-1, dtype=torch.uint8)
