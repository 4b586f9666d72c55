"""integer: b-bit grouped integers, value = scale * (code - zero).

b in {2, 3, 4, 8}; a group is `group_size` consecutive columns of one row, -1 meaning the whole
row. Symmetric: zero is 2^(b-1) and not stored. `activations: int8` quantizes the layer's input to
int8, one scale per token, at run time (what PyTorch calls dynamic quantization).

Stored, for a [rows, cols] matrix cut into blocks of B columns (B = group_size, or 32 for whole
rows):

  weight_packed  uint8 [rows, cols*b/8]   block after block; inside one, a plane of p bits (p = b,
                 and for b = 3 a 2-bit plane then a 1-bit plane) keeps columns i, i + B*p/8,
                 i + 2*B*p/8, ... in byte i, lowest bits first. 128 columns of 4 bits are one
                 64-byte line whose low nibbles are columns 0-63: shift and mask, no shuffles.
  weight_scales  [rows, groups] bfloat16 or float16
  weight_zeros   uint8 [rows*b/8, groups], asymmetric only: the same planes in blocks of 8 rows, so
                 that any multiple of 8 rows and any group is a clean slice

Fails where: cols is no multiple of group_size and 32; at 2 bits without GPTQ the loss is large.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compress_methods.errors import FormatError
from compress_methods.formats.base import Axis, Format, TensorSpec, register_format
from compress_methods.formats.dense import DTYPES

PLANES = {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}
GROUP_SIZES = (-1, 32, 64, 128)
ROW_BLOCK = 32
ZERO_ROWS = 8


@dataclass(frozen=True)
class IntegerSolution:
    """Codes uint8 [rows, cols]; scales [rows, groups]; zeros uint8 [rows, groups] or None."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None


@register_format
@dataclass(frozen=True)
class Integer(Format):
    """b-bit integers in groups of columns; weight-only unless `activations` is `int8`."""

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    activations: str | None = None
    scale_dtype: str = "bfloat16"
    name: ClassVar[str] = "integer"

    def __post_init__(self) -> None:
        for key, value, valid in (
            ("bits", self.bits, PLANES),
            ("group_size", self.group_size, GROUP_SIZES),
            ("activations", self.activations, (None, "int8")),
            ("scale_dtype", self.scale_dtype, ("bfloat16", "float16")),
        ):
            if value not in valid:
                raise FormatError(
                    f"{key} is {value!r}, expected one of {', '.join(map(str, valid))}"
                )

    def check_shape(self, rows: int, cols: int) -> None:
        if self.group_size > 0 and cols % self.group_size:
            raise FormatError(f"group_size {self.group_size} does not divide {cols} columns")
        if cols % ROW_BLOCK:
            raise FormatError(f"{cols} columns are no multiple of {ROW_BLOCK}")

    @property
    def block(self) -> int:
        """Columns per packing block, B of the module docstring."""
        return self.group_size if self.group_size > 0 else ROW_BLOCK

    def groups(self, cols: int) -> int:
        return 1 if self.group_size < 0 else cols // self.group_size

    def tensors(self, rows: int, cols: int) -> dict[str, TensorSpec]:
        self.check_shape(rows, cols)
        block, groups = self.block, self.groups(cols)
        per_group = Axis(1, self.group_size) if self.group_size > 0 else None
        packed = Axis(1, block, block * self.bits // 8)
        out = {
            "weight_packed": TensorSpec((rows, packed.entries(cols)), torch.uint8, Axis(0), packed),
            "weight_scales": TensorSpec(
                (rows, groups), DTYPES[self.scale_dtype], Axis(0), per_group
            ),
        }
        if not self.symmetric:
            by_rows = Axis(0, ZERO_ROWS, self.bits)
            out["weight_zeros"] = TensorSpec(
                (by_rows.entries(rows), groups), torch.uint8, by_rows, per_group
            )
        return out

    def extent(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Least and greatest value each group has to reach, zero included: [rows, groups] each."""
        grouped = self._grouped(weight)
        if self.symmetric:
            high = grouped.abs().amax(-1)
            return -high, high
        return grouped.amin(-1).clamp_(max=0), grouped.amax(-1).clamp_(min=0)

    def grid(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scales, rounded to their stored dtype, and zeros of groups reaching from low to high."""
        top = 2**self.bits - 1
        scales = ((high - low) / top).to(DTYPES[self.scale_dtype])
        scales = torch.where(scales == 0, torch.ones_like(scales), scales)
        if self.symmetric:
            return scales, None
        return scales, (-low / scales.float()).round_().clamp_(0, top).to(torch.uint8)

    def fit(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scales and zeros with which every value of `weight` is within its group's range."""
        return self.grid(*self.extent(weight))

    def encode(self, values: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
        """Nearest codes of `values`; scales and zeros broadcast against them. Float, not packed."""
        offset = 2 ** (self.bits - 1) if zeros is None else zeros
        return (values / scales).add_(offset).round_().clamp_(0, 2**self.bits - 1)

    def decode(self, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
        """scale * (code - zero) in float32; scales and zeros broadcast against the codes."""
        offset = 2 ** (self.bits - 1) if zeros is None else zeros.float()
        return (codes.float() - offset).mul_(scales.float())

    def nearest(self, weight: Tensor) -> IntegerSolution:
        return self.round_to(weight, *self.fit(weight))

    def round_to(self, weight: Tensor, scales: Tensor, zeros: Tensor | None) -> IntegerSolution:
        """Every value of `weight` rounded to the nearest code of given scales and zeros."""
        z = None if zeros is None else zeros.float()[..., None]
        codes = self.encode(self._grouped(weight), scales.float()[..., None], z)
        return IntegerSolution(codes.to(torch.uint8).reshape(weight.shape), scales, zeros)

    def values(self, solution: IntegerSolution) -> Tensor:
        """[rows, cols] float32 values of a solution."""
        zeros = None if solution.zeros is None else solution.zeros[..., None]
        grouped = self.decode(self._grouped(solution.codes), solution.scales[..., None], zeros)
        return grouped.reshape(solution.codes.shape)

    def pack(self, solution: IntegerSolution) -> dict[str, Tensor]:
        scales = solution.scales.to(DTYPES[self.scale_dtype]).contiguous()
        if not scales.isfinite().all():
            raise FormatError(f"a scale does not fit {self.scale_dtype}; use scale_dtype: bfloat16")
        out = {
            "weight_packed": pack_codes(solution.codes, self.bits, self.block),
            "weight_scales": scales,
        }
        if solution.zeros is not None:
            rows = torch.nn.functional.pad(solution.zeros.T, (0, -len(solution.zeros) % ZERO_ROWS))
            out["weight_zeros"] = pack_codes(rows, self.bits, ZERO_ROWS).T.contiguous()
        return out

    def solution(self, tensors: Mapping[str, Tensor]) -> IntegerSolution:
        """Inverse of `pack`."""
        packed, scales = tensors["weight_packed"], tensors["weight_scales"]
        zeros = None
        if not self.symmetric:
            zeros = self.unpack_zeros(tensors["weight_zeros"], len(scales))
        return IntegerSolution(unpack_codes(packed, self.bits, self.block), scales, zeros)

    def unpack_zeros(self, packed: Tensor, rows: int) -> Tensor:
        """uint8 [rows, groups] of stored `weight_zeros`."""
        return unpack_codes(packed.T.contiguous(), self.bits, ZERO_ROWS).T[:rows].contiguous()

    def unpack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return self.values(self.solution(tensors))

    def quantize_activations(self, x: Tensor) -> Tensor:
        if self.activations is None:
            return x
        codes, scale = quantize_per_token(x)
        return (codes * scale).to(x.dtype)

    def describe(self) -> str:
        group = "row" if self.group_size < 0 else f"g{self.group_size}"
        kind = "" if self.symmetric else " asym"
        activations = "" if self.activations is None else " + int8 activations"
        return f"int{self.bits} {group}{kind}{activations}"

    def _grouped(self, matrix: Tensor) -> Tensor:
        rows, cols = matrix.shape
        return matrix.reshape(rows, self.groups(cols), -1)


def quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 codes (held in float32) of each row of [..., cols], and scales [..., 1]."""
    x = x.float()
    scale = (x.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-30)
    return (x / scale).round_(), scale


def pack_codes(codes: Tensor, bits: int, block: int) -> Tensor:
    """uint8 codes [n, m] -> uint8 [n, m*bits/8], in blocks of `block` (a multiple of 8) codes."""
    blocks = codes.to(torch.uint8).reshape(codes.shape[0], -1, block)
    planes, shift = [], 0
    for width in PLANES[bits]:
        plane = (blocks >> shift) & (2**width - 1)
        lanes = plane.unflatten(-1, (8 // width, -1))
        planes.append(sum(lanes[..., i, :] << (i * width) for i in range(8 // width)))
        shift += width
    return torch.cat(planes, -1).reshape(codes.shape[0], -1).contiguous()


def unpack_codes(packed: Tensor, bits: int, block: int) -> Tensor:
    """Inverse of `pack_codes`."""
    blocks = packed.reshape(packed.shape[0], -1, block * bits // 8)
    codes, start, shift = None, 0, 0
    for width in PLANES[bits]:
        size = block * width // 8
        plane = blocks[..., start : start + size]
        lanes = [(plane >> (i * width)) & (2**width - 1) for i in range(8 // width)]
        part = torch.cat(lanes, -1) << shift
        codes = part if codes is None else codes | part
        start, shift = start + size, shift + width
    assert codes is not None
    return codes.reshape(packed.shape[0], -1)
