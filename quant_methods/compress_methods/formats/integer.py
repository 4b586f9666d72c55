"""integer: b-bit grouped integers, value = scale * (code - zero).

b in {2, 3, 4, 5, 6, 8}; a group is `group_size` consecutive columns of one row, -1 meaning the
whole row. Symmetric: zero is 2^(b-1) and not stored; a group's scale may be negative, which says on
which side the one value more is. `levels: mid`: zero is 2^(b-1) - 1/2, so the values are symmetric
and 0 is none of them; at 2 bits that loses a third less (Qift, arXiv:2606.02823), at 4 bits
nothing; not beyond.
`activations: int8` quantizes the layer's input to int8, one scale per token, at run time (what
PyTorch calls dynamic quantization).

Stored, for a [rows, cols] matrix cut into blocks of B columns (B = group_size, or 32 for whole
rows):

  weight_packed  uint8 [rows, cols*b/8]   codes as `codes.py` packs them: 128 columns of 4 bits are
                 one 64-byte line whose low nibbles are columns 0-63
  weight_scales  [rows, groups] bfloat16, float16 or float32
  weight_zeros   uint8 [rows*b/8, groups], asymmetric only: the same planes in blocks of 8 rows, so
                 that any multiple of 8 rows and any group is a clean slice

Fails where: cols is no multiple of group_size and 32; at 2 bits without GPTQ the loss is large.
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
from compress_methods.formats.encoding.codes import PLANES, pack_codes, unpack_codes
from compress_methods.formats.encoding.grouped import GROUP_SIZES, SCALES, Grouped, require_known
from compress_methods.formats.fitting.least_squares import Unscaled
from compress_methods.formats.fitting.range_search import search_scales
from compress_methods.formats.relaxed import RelaxedCodes, stored_as
from compress_methods.formats.rounder import entries_at
from compress_methods.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

ZEROS = "weight_zeros"
WHOLE, MID = LEVELS = ("whole", "mid")
MOST_MID_BITS = 4
ZERO_ROWS = 8
"""Of its start, what training may make of a scale."""


@dataclass(frozen=True)
class IntegerSolution:
    """Codes uint8 [rows, cols]; scales [rows, groups]; zeros uint8 [rows, groups] or None."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None


@register_format
@dataclass(frozen=True)
class Integer(Grouped):
    """b-bit integers in groups of columns; weight-only unless `activations` is `int8`."""

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    activations: str | None = None
    scale_dtype: str = "bfloat16"
    levels: str = WHOLE
    name: ClassVar[str] = "integer"

    def __post_init__(self) -> None:
        require_known(
            (
                ("bits", self.bits, PLANES),
                ("group_size", self.group_size, GROUP_SIZES),
                ("activations", self.activations, (None, "int8")),
                ("scale_dtype", self.scale_dtype, ("bfloat16", "float16", "float32")),
                ("levels", self.levels, LEVELS),
            )
        )
        if self.levels == MID and not (self.symmetric and self.bits <= MOST_MID_BITS):
            raise FormatError("levels is 'mid', expected symmetric integers of 2, 3 or 4 bits")

    @property
    def holds_zero(self) -> bool:
        return self.levels == WHOLE

    def tensors(self, rows: int, cols: int) -> dict[str, TensorSpec]:
        out = self.codes_and_scales(rows, cols, self.scale_dtype)
        if not self.symmetric:
            by_rows = Axis(0, ZERO_ROWS, self.bits)
            shape = (by_rows.entries(rows), self.groups(cols))
            out[ZEROS] = TensorSpec(shape, "uint8", by_rows, self.per_group)
        return out

    @property
    def lopsided(self) -> bool:
        """Whether symmetric groups reach further on one side."""
        return self.symmetric and self.levels == WHOLE

    @property
    def middle(self) -> float:
        """The zero of symmetric groups."""
        return 2 ** (self.bits - 1) - (0.5 if self.levels == MID else 0)

    def extent(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Least and greatest value each group has to reach, zero included: [rows, groups] each."""
        grouped = self._grouped(weight)
        if self.symmetric:
            high = grouped.abs().amax(-1)
            return -high, high
        return grouped.amin(-1).clamp_(max=0), grouped.amax(-1).clamp_(min=0)

    def scales_of(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scales, rounded to their stored dtype, and zeros of groups reaching from low to high."""
        top = 2**self.bits - 1
        scales = ((high - low) / top).to(torch_dtype(self.scale_dtype))
        scales = torch.where(scales == 0, torch.ones_like(scales), scales)
        if self.symmetric:
            return scales, None
        return scales, (-low / scales.float()).round_().clamp_(0, top).to(torch.uint8)

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Scales and zeros whose ranges cover every value of `weight`, or with `importance` those
        of least weighted squared error, see `range_search.py`."""
        if importance is not None:
            return search_scales(self, weight, importance)
        return self.scales_of(*self.extent(weight))

    def grid(self, weight: Tensor, importance: Tensor | None = None) -> AffineGrid:
        return AffineGrid(self, *self.fit(weight, importance))

    def encode(self, values: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
        """Nearest codes of `values`; scales and zeros broadcast against them. Float, not packed."""
        offset = self.middle if zeros is None else zeros
        return (values / scales).add_(offset).round_().clamp_(0, 2**self.bits - 1)

    def decode(self, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
        """scale * (code - zero) in float32; scales and zeros broadcast against the codes."""
        offset = self.middle if zeros is None else zeros.float()
        return (codes.float() - offset).mul_(scales.float())

    def nearest(
        self, weight: Tensor, importance: Tensor | None = None, mask: Tensor | None = None
    ) -> IntegerSolution:
        return self.round_to(weight, *self.fit(weight, importance))

    def round_to(self, weight: Tensor, scales: Tensor, zeros: Tensor | None) -> IntegerSolution:
        """Every value of `weight` rounded to the nearest code of given scales and zeros."""
        z = None if zeros is None else zeros.float()[..., None]
        codes = self.encode(self._grouped(weight), scales.float()[..., None], z)
        return IntegerSolution(codes.to(torch.uint8).reshape(weight.shape), scales, zeros)

    def matrix(self, solution: IntegerSolution) -> Tensor:
        """[rows, cols] float32 values of a solution."""
        zeros = None if solution.zeros is None else solution.zeros[..., None]
        grouped = self.decode(self._grouped(solution.codes), solution.scales[..., None], zeros)
        return grouped.reshape(solution.codes.shape)

    def grid_of(self, solution: IntegerSolution) -> AffineGrid:
        return AffineGrid(self, solution.scales, solution.zeros)

    def unscaled(self, solution: IntegerSolution) -> Unscaled:
        ones = solution.scales.new_ones(1)
        plain = replace(solution, scales=ones.expand_as(solution.scales))
        return Unscaled(self.matrix(plain), solution.scales)

    def rescaled(self, solution: IntegerSolution, scales: Tensor) -> IntegerSolution:
        return replace(solution, scales=scales)

    def pack(self, solution: IntegerSolution) -> dict[str, Tensor]:
        scales = solution.scales.to(torch_dtype(self.scale_dtype)).contiguous()
        if not scales.isfinite().all():
            raise FormatError(f"a scale does not fit {self.scale_dtype}; use scale_dtype: bfloat16")
        out = {
            MAIN_TENSOR: pack_codes(solution.codes, self.bits, self.block),
            SCALES: scales,
        }
        if solution.zeros is not None:
            rows = torch.nn.functional.pad(solution.zeros.T, (0, -len(solution.zeros) % ZERO_ROWS))
            out[ZEROS] = pack_codes(rows, self.bits, ZERO_ROWS).T.contiguous()
        return out

    def solution(self, tensors: Mapping[str, Tensor]) -> IntegerSolution:
        """Inverse of `pack`."""
        packed, scales = tensors[MAIN_TENSOR], tensors[SCALES]
        zeros = None
        if not self.symmetric:
            zeros = self.unpack_zeros(tensors[ZEROS], len(scales))
        return IntegerSolution(unpack_codes(packed, self.bits, self.block), scales, zeros)

    def unpack_zeros(self, packed: Tensor, rows: int) -> Tensor:
        """uint8 [rows, groups] of stored `weight_zeros`."""
        return unpack_codes(packed.T.contiguous(), self.bits, ZERO_ROWS).T[:rows].contiguous()

    def quantize_activations(self, x: Tensor) -> Tensor:
        if self.activations is None:
            return x
        codes, scale = quantize_per_token(x)
        return (codes * scale).to(x.dtype)

    def relax(self, solution: IntegerSolution, weight: Tensor) -> RelaxedInteger:
        return RelaxedInteger(self, solution, weight)

    def describe(self) -> str:
        group = self.group_name
        kind = " mid" if self.levels == MID else "" if self.symmetric else " asym"
        activations = "" if self.activations is None else " + int8 activations"
        return f"int{self.bits} {group}{kind}{activations}"

    def _grouped(self, matrix: Tensor) -> Tensor:
        rows, cols = matrix.shape
        return matrix.reshape(rows, self.groups(cols), -1)


class AffineGrid:
    """scale * (code - zero), scales and zeros [rows, groups] by groups of columns."""

    def __init__(self, fmt: Integer, scales: Tensor, zeros: Tensor | None) -> None:
        self.fmt, self.scales, self.zeros = fmt, scales, zeros
        # By group, and ready to multiply: a pass asks for one column after another.
        self._scales = scales.T.float().contiguous()
        self._zeros = None if zeros is None else zeros.T.float().contiguous()

    def pick(self, column: int | Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        size = self.fmt.group_size
        scales = entries_at(self._scales, column, size)
        zeros = None if self._zeros is None else entries_at(self._zeros, column, size)
        codes = self.fmt.encode(weights, scales, zeros)
        return codes.to(torch.uint8), self.fmt.decode(codes, scales, zeros)

    def solution(self, codes: Tensor) -> IntegerSolution:
        return IntegerSolution(codes, self.scales, self.zeros)


class RelaxedInteger(RelaxedCodes):
    """Codes [rows, groups, size]; zeros, where they are stored, which are whole from the first
    `settle` on."""

    rates = MappingProxyType({**RelaxedCodes.rates, "zeros": 0.5})

    def __init__(self, fmt: Integer, solution: IntegerSolution, weight: Tensor) -> None:
        self.fmt, self._shape = fmt, weight.shape
        self._scales = solution.scales.float()
        zeros = None if solution.zeros is None else solution.zeros.float()
        codes = fmt._grouped(weight) / self._scales[..., None]
        codes += fmt.middle if zeros is None else zeros[..., None]
        super().__init__(codes, 2**fmt.bits - 1, self._scales)
        if zeros is not None:
            self.parameters["zeros"] = zeros

    def matrix(self, parameters: Mapping[str, Tensor]) -> Tensor:
        dtype = torch_dtype(self.fmt.scale_dtype)
        scales = stored_as(self._scales * parameters["factors"], dtype)[..., None]
        zeros = parameters.get("zeros")
        offset = self.fmt.middle if zeros is None else zeros[..., None]
        return ((parameters["codes"] - offset) * scales).reshape(self._shape)

    def hold(self, solution: IntegerSolution) -> None:
        self.hold_codes(solution.codes.float().reshape(self.parameters["codes"].shape))

    def move(self, steps: Mapping[str, Tensor]) -> None:
        zeros = self.parameters.get("zeros")
        if zeros is not None and not self._settled.any():
            zeros.sub_(steps["zeros"])
        super().move(steps)

    def settle(self, share: float) -> None:
        codes, zeros = self.parameters["codes"], self.parameters.get("zeros")
        if zeros is not None and round(share * codes.numel()) and not self._settled.any():
            whole = zeros.round()
            codes.add_((whole - zeros)[..., None]).clamp_(0, self._top)
            zeros.copy_(whole)
        super().settle(share)

    def solution(self) -> IntegerSolution:
        codes, zeros = self.parameters["codes"], self.parameters.get("zeros")
        scales = self._scales * self.parameters["factors"]
        return IntegerSolution(
            codes.round().to(torch.uint8).reshape(self._shape),
            scales.to(torch_dtype(self.fmt.scale_dtype)),
            None if zeros is None else zeros.round().to(torch.uint8),
        )


def quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 codes (held in float32) of each row of [..., cols], and scales [..., 1]."""
    x = x.float()
    scale = (x.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-30)
    return (x / scale).round_(), scale
