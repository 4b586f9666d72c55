"""Codes of a few bits in 32-bit words, as other tools pack them: lowest bits first, either in one
stream over all words (GPTQ's 3 bits), or as many whole codes as fit in each (compressed-tensors').
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress_methods.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

WORD = 32


def unpack_stream(words: Tensor, bits: int) -> Tensor:
    """int32 [n, m] -> uint8 [n, m*32/bits], a code lying across two words where it must."""
    count = WORD // _common(bits)
    blocks = words.unflatten(1, (-1, bits // _common(bits)))
    lanes = []
    for place in range(count):
        word, shift = divmod(place * bits, WORD)
        held = min(bits, WORD - shift)
        # A shift keeps the sign, so only the bits asked for are taken.
        code = (blocks[..., word] >> shift) & (2**held - 1)
        if held < bits:
            code = code | ((blocks[..., word + 1] & (2 ** (bits - held) - 1)) << held)
        lanes.append(code.to(torch.uint8))
    return torch.stack(lanes, -1).flatten(1)


def pack_stream(codes: Tensor, bits: int) -> Tensor:
    """Inverse of `unpack_stream`, for codes that fill whole words."""
    count = WORD // _common(bits)
    lanes = codes.unflatten(1, (-1, count)).to(torch.int64)
    words = torch.zeros(*lanes.shape[:2], bits // _common(bits), dtype=torch.int64)
    for place in range(count):
        word, shift = divmod(place * bits, WORD)
        words[..., word] |= (lanes[..., place] << shift) & (2**WORD - 1)
        if shift + bits > WORD:
            words[..., word + 1] |= lanes[..., place] >> (WORD - shift)
    return words.flatten(1).to(torch.int32)


def unpack_words(words: Tensor, bits: int, count: int) -> Tensor:
    """int32 [n, m] -> uint8 [n, count]: of whole codes in each word, or of one stream where that is
    what the number of words comes to."""
    each = WORD // bits
    if words.shape[1] != -(-count // each):
        return unpack_stream(words, bits)[:, :count]
    lanes = [((words >> (bits * i)) & (2**bits - 1)).to(torch.uint8) for i in range(each)]
    return torch.stack(lanes, -1).flatten(1)[:, :count]


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """uint8 [n, count] -> int32 [n, m] of whole codes in each word, the last one filled with 0."""
    each = WORD // bits
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % each))
    lanes = padded.unflatten(1, (-1, each)).to(torch.int64)
    shifts = torch.arange(each, device=codes.device) * bits
    return (lanes << shifts).sum(-1).to(torch.int32)


def _common(bits: int) -> int:
    """Greatest power of two in both a word and a code: what blocks of a stream are counted in."""
    return bits & -bits
