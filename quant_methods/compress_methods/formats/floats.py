"""float: floats of 4 or 8 bits that groups of columns scale, value = scale * float.

  fp8    E4M3; a scale for a row, for `group_size` columns of one, or for blocks of 128 x 128
  mxfp8  E4M3; a power of two (E8M0) for 32 columns of a row
  mxfp4  E2M1; the same (both: OCP Microscaling Formats 1.0, 2023)
  nvfp4  E2M1; an E4M3 scale for 16 columns of a row, times one scale of the row (NVIDIA, 2025,
         arXiv:2509.25149, has one of the tensor instead)

`small_floats.py` says which values these are. The row's scale of `nvfp4` is a power of two: so a
matrix is solved in slabs of rows and cut anywhere, and rows are brought to one scale of a tensor
exactly, by the exponents of their E4M3 scales. `activations: fp8` (of `fp8` only) makes E4M3 of the
layer's input at run time, a scale for each token, or for 128 columns of one where weights have
blocks.

Where a pass asks for it, scales of 4 bits are searched: of `mxfp4` the exponent; of `nvfp4`
multiples of what makes the largest value of a group 6, among them the one that makes it 4
(FourOverSix, Cook et al., 2025, arXiv:2512.02010).

Stored, for a [rows, cols] matrix, and as what compressed-tensors has it:

  weight_packed      fp8, mxfp8: float8_e4m3fn [rows, cols], its `weight`
                     mxfp4, nvfp4: uint8 [rows, cols/2], codes as `codes.py` packs them; its
                     `weight_packed`, which has neighbours in a byte
  weight_scales      [rows, groups], blocks [rows/128, groups]; its `weight_scale`. fp8: float32,
                     bfloat16 for groups in one row; mxfp8, mxfp4: uint8, the exponent plus 127;
                     nvfp4: float8_e4m3fn
  weight_row_scales  float32 [rows], nvfp4 only; 1 / `weight_global_scale` if all are the same

Fails where: cols is no multiple of the group, or of 32 at 4 bits; cuts inside a block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar

from compress_methods.errors import FormatError
from compress_methods.formats.base import (
    MAIN_TENSOR,
    Axis,
    TensorSpec,
    register_format,
    torch_dtype,
)
from compress_methods.formats.encoding.codes import pack_codes, unpack_codes
from compress_methods.formats.encoding.grouped import (
    GROUP_SIZES,
    SCALES,
    Grouped,
    require_known,
    spread,
)
from compress_methods.formats.encoding.relaxed_levels import RelaxedLevels, distinct
from compress_methods.formats.encoding.small_floats import (
    MOST_E2M1,
    MOST_E4M3,
    decode_e2m1,
    decode_e4m3,
    decode_e8m0,
    encode_e2m1,
    encode_e4m3,
    encode_e8m0,
    nearest_e4m3,
    nearest_power,
    power_above,
)
from compress_methods.formats.fitting.least_squares import Unscaled
from compress_methods.formats.fitting.range_search import search_scales
from compress_methods.formats.rounder import entries_at
from compress_methods.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

ROW_SCALES = "weight_row_scales"
FP8, MXFP8, MXFP4, NVFP4 = "fp8", "mxfp8", "mxfp4", "nvfp4"
OWN_GROUPS = MappingProxyType({FP8: -1, MXFP8: 32, MXFP4: 32, NVFP4: 16})
"""Columns that share a scale, by kind."""
EIGHT_BITS = (FP8, MXFP8)
POWERS = (MXFP8, MXFP4)
BLOCK = 128
HALVES = (1.0, 0.5)
SIXTEENTHS = tuple(k / 16 for k in range(10, 26))
"""Multiples of a scale that clips nothing, of `mxfp4` and of `nvfp4`; 1.5 makes 4 of what would be
6."""


@dataclass(frozen=True)
class FloatSolution:
    """Codes uint8 [rows, cols]; `scales` float32 [rows or blocks, groups], each of a value that is
    stored; `of_rows` float32 [rows], or None."""

    codes: Tensor
    scales: Tensor
    of_rows: Tensor | None = None


@register_format
@dataclass(frozen=True)
class Float(Grouped):
    """Floats of a kind. `group_size` and `group_rows` are a choice of `fp8` alone: a whole row (-1)
    unless they say otherwise."""

    kind: str = FP8
    group_size: int = 0
    group_rows: int = 1
    activations: str | None = None
    name: ClassVar[str] = "float"
    symmetric: ClassVar[bool] = True
    lopsided: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_known((("kind", self.kind, OWN_GROUPS),))
        own = OWN_GROUPS[self.kind]
        if self.group_size == 0:
            object.__setattr__(self, "group_size", own)
        chosen = self.kind == FP8
        groups = (GROUP_SIZES if self.group_rows == 1 else (BLOCK,)) if chosen else (own,)
        require_known(
            (
                ("group_rows", self.group_rows, (1, BLOCK) if chosen else (1,)),
                ("group_size", self.group_size, groups),
                ("activations", self.activations, (None, FP8) if chosen else (None,)),
            )
        )

    @property
    def bits(self) -> int:
        return 8 if self.kind in EIGHT_BITS else 4

    @property
    def scale_dtype(self) -> str:
        """Of `weight_scales`."""
        if self.kind in POWERS:
            return "uint8"
        if self.kind == NVFP4:
            return "float8_e4m3fn"
        return "bfloat16" if self.group_size > 0 and self.group_rows == 1 else "float32"

    @property
    def searches_range(self) -> bool:
        """E4M3 is as fine near 448 as far below it: another scale wins nothing, clipping loses."""
        return self.bits == 4

    def check_shape(self, rows: int, cols: int) -> None:
        if self.bits < 8:
            super().check_shape(rows, cols)
        elif self.group_size > 0 and cols % self.group_size:
            raise FormatError(f"group_size {self.group_size} does not divide {cols} columns")

    def tensors(self, rows: int, cols: int) -> dict[str, TensorSpec]:
        out = self.codes_and_scales(rows, cols, self.scale_dtype)
        if self.bits == 8:
            out[MAIN_TENSOR] = TensorSpec((rows, cols), "float8_e4m3fn", Axis(0), Axis(1))
        by_rows = Axis(0, self.group_rows)
        shape = (by_rows.entries(rows), self.groups(cols))
        out[SCALES] = replace(out[SCALES], shape=shape, rows_axis=by_rows)
        if self.kind == NVFP4:
            out[ROW_SCALES] = TensorSpec((rows,), "float32", Axis(0))
        return out

    def extent(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """What each group has to reach: [rows, groups] each, or blocks in place of rows."""
        high = weight.reshape(len(weight), self.groups(weight.shape[1]), -1).abs().amax(-1)
        if self.group_rows > 1:
            padded = torch.nn.functional.pad(high, (0, 0, 0, -len(high) % self.group_rows))
            high = padded.unflatten(0, (-1, self.group_rows)).amax(1)
        return -high, high

    def scales_of(self, low: Tensor, high: Tensor) -> tuple[Tensor, None]:
        """Scales, of values that are stored, of groups that reach from low to high."""
        most = MOST_E4M3 if self.bits == 8 else MOST_E2M1
        wanted = (high - low) / (2 * most)
        if self.kind in POWERS:
            return power_above(wanted), None
        found = self.nearest_scales(wanted)
        return torch.where(found == 0, torch.ones_like(found), found), None

    def nearest_scales(self, wanted: Tensor) -> Tensor:
        """float32 of the values that are stored nearest to positive scales."""
        if self.kind in POWERS:
            return nearest_power(wanted)
        if self.kind == NVFP4:
            return nearest_e4m3(wanted)
        return wanted.to(torch_dtype(self.scale_dtype)).float()

    def encode(self, values: Tensor, scales: Tensor, zeros: Tensor | None = None) -> Tensor:
        """Nearest codes of `values`; scales broadcast against them."""
        return (encode_e4m3 if self.bits == 8 else encode_e2m1)(values / scales)

    def decode(self, codes: Tensor, scales: Tensor, zeros: Tensor | None = None) -> Tensor:
        """What codes stand for."""
        return self.floats(codes).mul_(scales)

    def floats(self, codes: Tensor) -> Tensor:
        """float32 of codes, not scaled."""
        return decode_e4m3(codes) if self.bits == 8 else decode_e2m1(codes)

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Scales, and those of rows, that clip no value of `weight`, or with `importance` those of
        least weighted squared error."""
        of_rows = None
        if self.kind == NVFP4:
            # 1.5 times as much as the largest group needs is still an E4M3.
            most = weight.abs().amax(1) * SIXTEENTHS[-1] / (MOST_E2M1 * MOST_E4M3)
            of_rows = torch.where(most == 0, torch.ones_like(most), power_above(most))
            weight = weight / of_rows[:, None]
        if importance is None or not self.searches_range:
            return self.scales_of(*self.extent(weight))[0], of_rows
        factors = SIXTEENTHS if self.kind == NVFP4 else HALVES
        return search_scales(self, weight, importance, factors, fine=())[0], of_rows

    def whole_scales(self, scales: Tensor, of_rows: Tensor | None, rows: int) -> Tensor:
        """float32 [rows, groups] of what a group's floats are multiplied by."""
        if self.group_rows > 1:
            scales = scales.repeat_interleave(self.group_rows, 0)[:rows]
        return scales if of_rows is None else scales * of_rows[:, None]

    def grid(self, weight: Tensor, importance: Tensor | None = None) -> FloatGrid:
        return FloatGrid(self, len(weight), *self.fit(weight, importance))

    def nearest(
        self, weight: Tensor, importance: Tensor | None = None, mask: Tensor | None = None
    ) -> FloatSolution:
        scales, of_rows = self.fit(weight, importance)
        whole = self.whole_scales(scales, of_rows, len(weight))
        codes = self.encode(weight, spread(whole, weight.shape[1]))
        return FloatSolution(codes, scales, of_rows)

    def matrix(self, solution: FloatSolution) -> Tensor:
        """[rows, cols] float32 values of a solution."""
        rows, cols = solution.codes.shape
        whole = self.whole_scales(solution.scales, solution.of_rows, rows)
        return self.floats(solution.codes) * spread(whole, cols)

    def grid_of(self, solution: FloatSolution) -> FloatGrid:
        return FloatGrid(self, len(solution.codes), solution.scales, solution.of_rows)

    def unscaled(self, solution: FloatSolution) -> Unscaled | None:
        """None where rows share scales: floats of 8 bits lose too little for it to matter."""
        if self.group_rows > 1:
            return None
        values = self.floats(solution.codes)
        if solution.of_rows is not None:
            values *= solution.of_rows[:, None]
        return Unscaled(values, solution.scales, self.nearest_scales)

    def rescaled(self, solution: FloatSolution, scales: Tensor) -> FloatSolution:
        return replace(solution, scales=scales)

    def relax(self, solution: FloatSolution, weight: Tensor) -> RelaxedFloat:
        return RelaxedFloat(self, solution, weight)

    def pack(self, solution: FloatSolution) -> dict[str, Tensor]:
        if not solution.scales.isfinite().all():
            raise FormatError(f"a scale does not fit {self.scale_dtype}")
        if self.kind in POWERS:
            scales = encode_e8m0(solution.scales)
        else:
            scales = solution.scales.to(torch_dtype(self.scale_dtype)).contiguous()
        codes = solution.codes
        if self.bits == 8:
            packed = codes.contiguous().view(torch.float8_e4m3fn)
        else:
            packed = pack_codes(codes, self.bits, self.block)
        out = {MAIN_TENSOR: packed, SCALES: scales}
        return out if solution.of_rows is None else {**out, ROW_SCALES: solution.of_rows}

    def solution(self, tensors: Mapping[str, Tensor]) -> FloatSolution:
        """Inverse of `pack`."""
        packed, scales = tensors[MAIN_TENSOR], tensors[SCALES]
        codes = packed.view(torch.uint8)
        if self.bits < 8:
            codes = unpack_codes(packed, self.bits, self.block)
        if self.kind in POWERS:
            values = decode_e8m0(scales)
        else:
            values = scales.float()
        return FloatSolution(codes, values, tensors.get(ROW_SCALES))

    def quantize_activations(self, x: Tensor) -> Tensor:
        if self.activations is None:
            return x
        cols = x.shape[-1]
        groups = x.float().unflatten(-1, (-1, BLOCK if self.group_rows > 1 else max(1, cols)))
        scale = (groups.abs().amax(-1, keepdim=True) / MOST_E4M3).clamp(min=1e-30)
        return (decode_e4m3(encode_e4m3(groups / scale)) * scale).flatten(-2).to(x.dtype)

    @property
    def cut_by(self) -> str:
        if self.kind != FP8:
            return "group (another kind)"
        return "group_rows" if self.group_rows > 1 else "group_size"

    def describe(self) -> str:
        activations = "" if self.activations is None else " + fp8 activations"
        if self.kind != FP8:
            return self.kind
        group = self.group_name
        if self.group_rows > 1:
            group = f"{self.group_rows}x{self.group_size}"
        return f"{self.kind} {group}{activations}"


class FloatGrid:
    """scale * float, scales by groups of columns as `Float.fit` gives them."""

    def __init__(self, fmt: Float, rows: int, scales: Tensor, of_rows: Tensor | None) -> None:
        self.fmt, self.scales, self.of_rows = fmt, scales, of_rows
        # By group, and ready to multiply: a pass asks for one column after another.
        self._scales = fmt.whole_scales(scales, of_rows, rows).T.contiguous()

    def pick(self, column: int | Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        scales = entries_at(self._scales, column, self.fmt.group_size)
        codes = self.fmt.encode(weights, scales)
        return codes, self.fmt.decode(codes, scales)

    def solution(self, codes: Tensor) -> FloatSolution:
        return FloatSolution(codes, self.scales, self.of_rows)


class RelaxedFloat(RelaxedLevels):
    """Places among the floats there are, and scales, but for powers of two, which are too far from
    each other."""

    def __init__(self, fmt: Float, solution: FloatSolution, weight: Tensor) -> None:
        self.fmt, self._scales, self._of_rows = fmt, solution.scales, solution.of_rows
        codes = torch.arange(2**fmt.bits, dtype=torch.int32, device=weight.device).byte()
        floats = fmt.floats(codes)
        known = floats.isfinite()
        levels, stored = distinct(floats[known], codes[known])
        whole = fmt.whole_scales(self._scales, self._of_rows, len(weight))
        moving = None if fmt.kind in POWERS else self._scales
        super().__init__(levels, stored, weight / spread(whole, weight.shape[1]), moving)

    def matrix(self, parameters: Mapping[str, Tensor]) -> Tensor:
        values = self.values(parameters["codes"])
        scales = self._scales
        if "factors" in parameters:
            wanted = scales * parameters["factors"]
            scales = self.fmt.nearest_scales(wanted.detach()) + (wanted - wanted.detach())
        whole = self.fmt.whole_scales(scales, self._of_rows, len(values))
        return values * spread(whole, values.shape[1])

    def hold(self, solution: FloatSolution) -> None:
        self.hold_values(self.fmt.floats(solution.codes))

    def solution(self) -> FloatSolution:
        scales = self._scales
        if "factors" in self.parameters:
            scales = self.fmt.nearest_scales(scales * self.parameters["factors"])
        return FloatSolution(self.codes(), scales, self._of_rows)
