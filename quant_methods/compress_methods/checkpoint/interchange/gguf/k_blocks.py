"""Blocks of 256 values of GGUF, in 8 runs of 32 or 16 of 16, whose scales are codes themselves.

  Q2_K  scale and least of 4 bits each    d * s * code - m * l
  Q3_K  scale of 6 bits, less 32          d * s * (code - 4)
  Q4_K, Q5_K  scale and least of 6 bits   d * s * code - m * l
  Q6_K  scale int8                        d * s * (code - 32)
  IQ4_XS      scale of 6 bits, less 32    d * s * table[code]

d and m are float16, of the block. Products are taken in float32 in this order, as llama.cpp's
reference does, so values have its bits. Runs of 32 are groups of ours, whose scales and offsets are
float32; runs of 16 are not, so no format of ours holds those exactly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress_methods.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def q2_k(blocks: Tensor) -> Tensor:
    both, codes, d, least = _parts(blocks, 16, 64, 2, 2)
    scales = _half(d) * (both & 15).float()
    leasts = _half(least) * (both >> 4).float()
    runs = _shifted(codes, 32, (0, 2, 4, 6), 3).reshape(len(blocks), 16, 16)
    return (scales[..., None] * runs.float() - leasts[..., None]).flatten(1)


def q3_k(blocks: Tensor) -> Tensor:
    high, codes, packed, d = _parts(blocks, 32, 64, 12, 2)
    low, top = packed[:, :8], packed[:, 8:]
    scales = torch.cat((low & 15, low >> 4), 1) | (_shifted(top, 4, (0, 2, 4, 6), 3) << 4)
    factors = _half(d) * (scales.float() - 32)
    runs = _shifted(codes, 32, (0, 2, 4, 6), 3)
    # Where the bit is not set, 4 is taken away.
    fourth = _shifted(high, 32, tuple(range(8)), 1)
    values = runs.float() - 4 * (1 - fourth.float())
    return (factors[..., None] * values.reshape(-1, 16, 16)).flatten(1)


def q4_k(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales, offsets."""
    d, least, packed, codes = _parts(blocks, 2, 2, 12, 128)
    runs = _shifted(codes, 32, (0, 4), 15)
    return runs, *_scales(d, least, packed)


def q5_k(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same."""
    d, least, packed, high, codes = _parts(blocks, 2, 2, 12, 32, 128)
    fifth = _shifted(high, 32, tuple(range(8)), 1)
    runs = _shifted(codes, 32, (0, 4), 15) | (fifth << 4)
    return runs, *_scales(d, least, packed)


def q6_k(blocks: Tensor) -> Tensor:
    low, high, scales, d = _parts(blocks, 128, 64, 16, 2)
    factors = _half(d) * scales.contiguous().view(torch.int8).float()
    codes = _shifted(low, 64, (0, 4), 15) | (_shifted(high, 32, (0, 2, 4, 6), 3) << 4)
    values = codes.float() - 32
    return (factors[..., None] * values.reshape(-1, 16, 16)).flatten(1)


def iq4_xs(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales."""
    d, top, low, codes = _parts(blocks, 2, 2, 4, 128)
    word = top[:, :1].int() | (top[:, 1:].int() << 8)
    high = (word >> torch.arange(0, 16, 2)) & 3
    scales = torch.stack((low & 15, low >> 4), -1).flatten(1).int() | (high << 4)
    return _shifted(codes, 16, (0, 4), 15), _half(d) * (scales - 32).float()


def _scales(d: Tensor, least: Tensor, packed: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and offsets of Q4_K and Q5_K: eight scales and leasts of 6 bits in twelve bytes, the
    last four bytes holding the low bits of the last four of both."""
    first, second, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = torch.cat((first & 63, (rest & 15) | ((first >> 2) & 48)), 1)
    leasts = torch.cat((second & 63, (rest >> 4) | ((second >> 2) & 48)), 1)
    return _half(d) * scales.float(), -_half(least) * leasts.float()


def _parts(blocks: Tensor, *sizes: int) -> tuple[Tensor, ...]:
    return blocks.split(list(sizes), 1)


def _half(packed: Tensor) -> Tensor:
    """float32 [n, 1] of float16 in two bytes."""
    return packed.contiguous().view(torch.float16).float()


def _shifted(packed: Tensor, run: int, shifts: tuple[int, ...], mask: int) -> Tensor:
    """Codes [n, m * len(shifts)]: of every `run` bytes the lowest bits first, then the next."""
    lanes = packed.reshape(len(packed), -1, 1, run)
    bits = torch.tensor(shifts, dtype=torch.uint8)[:, None]
    return ((lanes >> bits) & mask).flatten(1)
