"""Which blocks of GGUF hold a format of ours exactly, and the blocks of a matrix.

An integer format is value = scale * level, the levels being code - zero: whole numbers, or halves
of odd ones with `levels: mid`, which count twice at half the scale. The smallest kind that has all
levels a format can have takes it: Q4_0 those from -8 to 7, Q5_0 from -16, Q8_0 from -128. A group
is one or more blocks of 32 with the same scale, so int4 in groups of 128 becomes Q4_0 with every
scale four times. Asymmetric int4 has levels from -15 to 15 and becomes Q5_0; Q4_1 would hold the
product of scale and zero point in a float16, which rounds it. MXFP4 is MXFP4.

Scales have to be float16; those in bfloat16 are, but for the very small and the very large.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compress_methods.checkpoint.interchange.gguf.blocks import KINDS, SMALL, Kind
from compress_methods.errors import FormatError
from compress_methods.formats import Format, Stored
from compress_methods.formats.floats import MXFP4, Float
from compress_methods.formats.integer import Integer
from compress_methods.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

Q4_0, Q5_0, Q8_0, MICROSCALED = 2, 6, 8, 39
MIDDLES = {Q4_0: 8, Q5_0: 16, Q8_0: 128}
"""Codes of level 0; as many levels lie below it, one less above."""


def equal_of(module: str, fmt: Format) -> int:
    """A key of `KINDS`; `FormatError` where there is none."""
    if isinstance(fmt, Float) and fmt.kind == MXFP4:
        return MICROSCALED
    if isinstance(fmt, Integer) and fmt.activations is None:
        top, times = 2**fmt.bits - 1, _times(fmt)
        low, high = (-top, top)
        if fmt.symmetric:
            low, high = int(-times * fmt.middle), int(times * (top - fmt.middle))
        for number, middle in MIDDLES.items():
            if -middle <= low and high < middle:
                return number
    raise FormatError(f"{module}: {fmt.describe()} has no equal in gguf")


def blocks_of(module: str, stored: Stored) -> Tensor:
    """uint8 [rows, bytes] of a matrix in the kind that is its equal; `FormatError` where its scales
    are no float16."""
    fmt, number = stored.format, equal_of(module, stored.format)
    rows, cols = stored.shape
    solution = fmt.solution(stored.tensors)
    codes, scales = solution.codes, solution.scales.float()
    if isinstance(fmt, Integer):
        scales = scales / _times(fmt)
        if not torch.equal(scales.half().float(), scales):
            raise FormatError(f"{module}: scales are not float16; give scale_dtype: float16")
        zeros: Any = fmt.middle
        if solution.zeros is not None:
            zeros = solution.zeros.float().repeat_interleave(cols // scales.shape[1], 1)
        levels = (codes.float() - zeros) * _times(fmt)
        codes = (levels + MIDDLES[number]).to(torch.uint8)
    scales = scales.repeat_interleave(cols // SMALL // scales.shape[1], 1)
    return _joined(KINDS[number], codes, scales).reshape(rows, -1)


def _joined(kind: Kind, codes: Tensor, scales: Tensor) -> Tensor:
    assert kind.joined is not None
    return kind.joined(codes.reshape(-1, SMALL), scales.reshape(-1, 1))


def _times(fmt: Integer) -> int:
    """What makes levels whole numbers."""
    return 1 if fmt.holds_zero else 2
