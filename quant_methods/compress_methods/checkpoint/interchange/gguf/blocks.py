"""Blocks of 32 values of GGUF, and the table of all kinds.

  Q4_0, Q5_0, Q8_0  a float16 scale, codes less 8, 16, 0:   scale * code
  Q4_1, Q5_1        scale and least value, both float16:    scale * code + least
  IQ4_NL            a float16 scale, codes of a table:      scale * table[code]
  MXFP4             an exponent, codes of E2M1

Nibbles are of values i (low) and i + 16; the fifth bits of all 32 lie in a word before them. All
of them are formats of ours, as are those of blocks of 256 whose groups have 32 values.
(github.com/ggml-org/llama.cpp, ggml/src/ggml-quants.c)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compress_methods.checkpoint.interchange.gguf import k_blocks
from compress_methods.formats import Format
from compress_methods.formats.encoding.small_floats import decode_e8m0, encode_e8m0
from compress_methods.formats.floats import MXFP4, Float, FloatSolution
from compress_methods.formats.integer import Integer, IntegerSolution
from compress_methods.formats.lookup import Lookup, LookupSolution
from compress_methods.formats.wrappers.shifted import Shifted, ShiftedSolution
from compress_methods.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

SMALL, LARGE = 32, 256


@dataclass(frozen=True)
class Kind:
    """Values in a block, its bytes, and what they are: `values` float32 [n, size] of blocks uint8
    [n, nbytes]; or `split` into codes uint8, scales and, if there are any, offsets of `format`,
    which holds them exactly, and `joined` of codes and scales again."""

    name: str
    size: int
    nbytes: int
    values: Callable[[Tensor], Tensor] | None = None
    format: Format | None = None
    split: Callable[[Tensor], tuple[Tensor, ...]] | None = None
    joined: Callable[[Tensor, Tensor], Tensor] | None = None

    def solution(self, blocks: Tensor, rows: int) -> Any:
        """Of `format`, for a matrix whose blocks lie row by row."""
        assert self.split is not None
        codes, scales, *offsets = (part.reshape(rows, -1) for part in self.split(blocks))
        if isinstance(self.format, Float):
            return FloatSolution(codes, scales)
        if isinstance(self.format, Lookup):
            return LookupSolution(codes, scales, self.format.fixed_table(codes))
        integers = IntegerSolution(codes, scales)
        return ShiftedSolution(integers, *offsets) if offsets else integers


def half(blocks: Tensor, first: int) -> Tensor:
    """float16 [n, 1] of two bytes of each block."""
    return blocks[:, first : first + 2].contiguous().view(torch.float16)


def nibbles(packed: Tensor) -> Tensor:
    """[n, 16] -> [n, 32], low ones first."""
    return torch.cat((packed & 15, packed >> 4), 1)


def fifth_bits(packed: Tensor) -> Tensor:
    """[n, 4] -> [n, 32], worth 16 each."""
    bits = torch.arange(8, dtype=torch.uint8)
    return ((packed[..., None] >> bits) & 1).flatten(1) << 4


def _q4_0(blocks: Tensor) -> tuple[Tensor, Tensor]:
    return nibbles(blocks[:, 2:]), half(blocks, 0)


def _q5_0(blocks: Tensor) -> tuple[Tensor, Tensor]:
    return nibbles(blocks[:, 6:]) | fifth_bits(blocks[:, 2:6]), half(blocks, 0)


def _q8_0(blocks: Tensor) -> tuple[Tensor, Tensor]:
    return blocks[:, 2:] ^ 128, half(blocks, 0)


def _mxfp4(blocks: Tensor) -> tuple[Tensor, Tensor]:
    return nibbles(blocks[:, 1:]), decode_e8m0(blocks[:, :1])


def _bytes(scales: Tensor) -> Tensor:
    """[n, 2] of float16 [n, 1]."""
    return scales.half().contiguous().view(torch.uint8)


def _paired(codes: Tensor) -> Tensor:
    """Inverse of `nibbles`."""
    low, high = (codes & 15).chunk(2, dim=1)
    return low | (high << 4)


def _join_q4_0(codes: Tensor, scales: Tensor) -> Tensor:
    return torch.cat((_bytes(scales), _paired(codes)), 1)


def _join_q5_0(codes: Tensor, scales: Tensor) -> Tensor:
    fifth = (codes >> 4).reshape(-1, 4, 8) << torch.arange(8, dtype=torch.uint8)
    return torch.cat((_bytes(scales), fifth.sum(-1, dtype=torch.uint8), _paired(codes)), 1)


def _join_q8_0(codes: Tensor, scales: Tensor) -> Tensor:
    return torch.cat((_bytes(scales), codes ^ 128), 1)


def _join_mxfp4(codes: Tensor, scales: Tensor) -> Tensor:
    return torch.cat((encode_e8m0(scales), _paired(codes)), 1)


def _q4_1(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return nibbles(blocks[:, 4:]), half(blocks, 0), half(blocks, 2)


def _q5_1(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    codes = nibbles(blocks[:, 8:]) | fifth_bits(blocks[:, 4:8])
    return codes, half(blocks, 0), half(blocks, 2)


def _iq4_nl(blocks: Tensor) -> tuple[Tensor, Tensor]:
    return nibbles(blocks[:, 2:]), half(blocks, 0)


def _integer(bits: int, scale_dtype: str = "float16") -> Integer:
    return Integer(bits, SMALL, scale_dtype=scale_dtype)


def _shifted(bits: int, dtype: str = "float16") -> Shifted:
    return Shifted(_integer(bits, dtype), dtype)


def _iq4(scale_dtype: str = "float16") -> Lookup:
    return Lookup(4, SMALL, "iq4", scale_dtype=scale_dtype)


KINDS = {
    2: Kind("Q4_0", SMALL, 18, format=_integer(4), split=_q4_0, joined=_join_q4_0),
    3: Kind("Q4_1", SMALL, 20, format=_shifted(4), split=_q4_1),
    6: Kind("Q5_0", SMALL, 22, format=_integer(5), split=_q5_0, joined=_join_q5_0),
    7: Kind("Q5_1", SMALL, 24, format=_shifted(5), split=_q5_1),
    8: Kind("Q8_0", SMALL, 34, format=_integer(8), split=_q8_0, joined=_join_q8_0),
    10: Kind("Q2_K", LARGE, 84, k_blocks.q2_k),
    11: Kind("Q3_K", LARGE, 110, k_blocks.q3_k),
    12: Kind("Q4_K", LARGE, 144, format=_shifted(4, "float32"), split=k_blocks.q4_k),
    13: Kind("Q5_K", LARGE, 176, format=_shifted(5, "float32"), split=k_blocks.q5_k),
    14: Kind("Q6_K", LARGE, 210, k_blocks.q6_k),
    20: Kind("IQ4_NL", SMALL, 18, format=_iq4(), split=_iq4_nl),
    23: Kind("IQ4_XS", LARGE, 136, format=_iq4("float32"), split=k_blocks.iq4_xs),
    39: Kind("MXFP4", SMALL, 17, format=Float(MXFP4), split=_mxfp4, joined=_join_mxfp4),
}
"""By the number a file has for them."""
PLAIN = {0: "float32", 1: "float16", 30: "bfloat16"}
EXPECTED = ", ".join(("F32, F16, BF16", *(kind.name for kind in KINDS.values())))
