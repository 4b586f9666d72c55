"""Floats of 4 and 8 bits, by their bits: E2M1, E4M3, and E8M0, which holds powers of two alone.

  E2M1  sign, 2 bits of exponent, 1 of mantissa: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives
  E4M3  sign, 4 bits of exponent, 3 of mantissa: up to 448, in steps of 2^-9 near 0; no infinities
  E8M0  8 bits of exponent: 2^-127 to 2^127

(OCP Microscaling Formats 1.0, 2023; E4M3: Micikevicius et al., 2022, arXiv:2209.05433.) What is too
large becomes the largest value.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from compress_methods.formats.encoding.codes import chosen
from compress_methods.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
MOST_E2M1, MOST_E4M3 = 6.0, 448.0
LEAST_E4M3 = 2.0**-9
SIGN = 8
MANTISSA_BITS, BIAS = 23, 127
"""Of float32, whose exponents E8M0 has."""
HALF_MANTISSA = 1 << (MANTISSA_BITS - 1)


def encode_e2m1(values: Tensor) -> Tensor:
    """Nearest codes uint8."""
    size = values.abs()
    codes = torch.zeros_like(values, dtype=torch.uint8)
    for low, high in pairwise(E2M1):
        codes += size > (low + high) / 2
    negative = (values < 0) & (codes > 0)
    return codes + negative.to(torch.uint8) * SIGN


def decode_e2m1(codes: Tensor) -> Tensor:
    """float32 values of codes uint8."""
    return _entries(torch.tensor([*E2M1, *(-value for value in E2M1)]), codes)


def encode_e4m3(values: Tensor) -> Tensor:
    """Nearest codes uint8."""
    clipped = values.clamp(-MOST_E4M3, MOST_E4M3)
    return clipped.to(torch.float8_e4m3fn).view(torch.uint8)


def decode_e4m3(codes: Tensor) -> Tensor:
    """float32 values of codes uint8."""
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    return _entries(every.float(), codes)


def _entries(table: Tensor, codes: Tensor) -> Tensor:
    """Of a table [k]; several times as fast as torch converts."""
    return chosen(table.to(codes.device)[None], codes)


def nearest_e4m3(values: Tensor) -> Tensor:
    """float32 of positive `values` as E4M3 holds them, not 0."""
    return decode_e4m3(encode_e4m3(values.clamp(min=LEAST_E4M3)))


def nearest_power(values: Tensor) -> Tensor:
    """The power of two nearest to each of `values` float32 that is positive; else the least."""
    bits = values.clamp(min=0).contiguous().view(torch.int32)
    return _power((bits + HALF_MANTISSA) >> MANTISSA_BITS)


def power_above(values: Tensor) -> Tensor:
    """The least power of two that is no less than each of `values` float32, none negative."""
    bits = values.contiguous().view(torch.int32)
    return _power((bits + ((1 << MANTISSA_BITS) - 1)) >> MANTISSA_BITS)


def _power(exponents: Tensor) -> Tensor:
    """float32 of exponents as float32 has them, none of them subnormal or infinite."""
    return (exponents.clamp(1, 2 * BIAS) << MANTISSA_BITS).view(torch.float32)


def encode_e8m0(powers: Tensor) -> Tensor:
    """Codes uint8 of powers of two float32."""
    bits = powers.float().contiguous().view(torch.int32)
    return (bits >> MANTISSA_BITS).to(torch.uint8)


def decode_e8m0(codes: Tensor) -> Tensor:
    """float32 values of codes uint8; 255, which is none, becomes infinity."""
    return (codes.int() << MANTISSA_BITS).clamp_(min=HALF_MANTISSA).view(torch.float32)
