"""shifted: integers in groups whose offsets are floats, value = scale * code + offset.

`base`, a symmetric `integer` format, says how codes, groups and scales are stored; codes count from
0 here. It is what tools give that choose a group's least value freely: GGUF's Q4_1, Q5_1, Q4_K and
Q5_K, and HQQ (Badri and Shaji, 2023), whose zero points are no whole numbers: offset = -scale *
zero. Written by `vllm-compress import`; `rtn` gives a group's least and greatest value a code each.

Stored: the tensors of `base`, and

  weight_offsets  [rows, groups] float16, bfloat16 or float32

Costs what the same integers with whole zero points cost plus 12 or 28 bits a group. Fails where:
`integer` does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from compress_methods.errors import FormatError
from compress_methods.formats.base import (
    Axis,
    Format,
    TensorSpec,
    register_format,
    torch_dtype,
)
from compress_methods.formats.encoding.grouped import require_known, stored_scales
from compress_methods.formats.integer import Integer, IntegerSolution
from compress_methods.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

OFFSETS = "weight_offsets"
DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class ShiftedSolution:
    """Codes and scales, and offsets [rows, groups]."""

    base: IntegerSolution
    offsets: Tensor


@register_format
@dataclass(frozen=True)
class Shifted(Format):
    """`base`: symmetric integers, weight-only; `offset_dtype`: of what is added to each group."""

    base: Format
    offset_dtype: str = "float16"
    name: ClassVar[str] = "shifted"

    def __post_init__(self) -> None:
        base = self.base
        whole = isinstance(base, Integer) and base.symmetric and base.holds_zero
        if not (isinstance(base, Integer) and whole and base.activations is None):
            raise FormatError(
                f"base is {base.describe()}, expected a symmetric integer format without "
                "activations"
            )
        require_known([("offset_dtype", self.offset_dtype, DTYPES)])

    @property
    def codes(self) -> Integer:
        """The base, as what it is."""
        assert isinstance(self.base, Integer)
        return self.base

    def check_shape(self, rows: int, cols: int) -> None:
        self.base.check_shape(rows, cols)

    def tensors(self, rows: int, cols: int) -> dict[str, TensorSpec]:
        shape = (rows, self.codes.groups(cols))
        offsets = TensorSpec(shape, self.offset_dtype, Axis(0), self.codes.per_group)
        return {**self.base.tensors(rows, cols), OFFSETS: offsets}

    def pack(self, solution: ShiftedSolution) -> dict[str, Tensor]:
        offsets = stored_scales(solution.offsets, self.offset_dtype)
        return {**self.base.pack(solution.base), OFFSETS: offsets}

    def solution(self, tensors: Mapping[str, Tensor]) -> ShiftedSolution:
        return ShiftedSolution(self.codes.solution(tensors), tensors[OFFSETS])

    def matrix(self, solution: ShiftedSolution) -> Tensor:
        codes, scales = solution.base.codes, solution.base.scales.float()[..., None]
        values = codes.float().reshape(len(codes), scales.shape[1], -1) * scales
        return (values + solution.offsets.float()[..., None]).reshape(codes.shape)

    def nearest(
        self, weight: Tensor, importance: Tensor | None = None, mask: Tensor | None = None
    ) -> ShiftedSolution:
        """Each group from its least value to its greatest."""
        rows, cols = weight.shape
        groups = weight.reshape(rows, self.codes.groups(cols), -1)
        low, high = groups.amin(-1), groups.amax(-1)
        offsets, top = low.to(torch_dtype(self.offset_dtype)), 2**self.codes.bits - 1
        # Of a group of one value 0: codes say nothing then.
        scales = ((high - offsets.float()) / top).to(torch_dtype(self.codes.scale_dtype))
        steps = scales.float().masked_fill(scales == 0, torch.inf)
        places = (groups - offsets.float()[..., None]) / steps[..., None]
        codes = places.round_().clamp_(0, top).byte().reshape(rows, cols)
        return ShiftedSolution(IntegerSolution(codes, scales), offsets)

    @property
    def holds_zero(self) -> bool:
        return False

    @property
    def cut_by(self) -> str:
        return "group_size"

    def describe(self) -> str:
        return f"shifted {self.base.describe()}"


def centred(fmt: Shifted, scales: Tensor, offsets: Tensor) -> Tensor:
    """float32 offsets of the same values where codes count from the middle, as `base` has them: a
    group's values are about as far on either side, so these are small."""
    return offsets.float() + scales.float() * float(fmt.codes.middle)
