"""Packing codes of a few bits into bytes, for every format that stores codes.

Codes lie in blocks. Inside one, a plane of p bits (p = bits; 3, 5 and 6 bits are planes of 2 and 1,
4 and 1, 4 and 2 bits) keeps columns i, i + B*p/8, i + 2*B*p/8, ... in byte i, lowest bits first, B
being the block's columns: shifts and masks unpack it, no shuffles.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress_methods.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}


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


def chosen(table: Tensor, places: Tensor) -> Tensor:
    """table[row, place] of [rows, k] by whole numbers [rows, n], or of [1, k] by any."""
    index = places.int()
    if len(table) > 1:
        first = torch.arange(0, table.numel(), table.shape[1], dtype=torch.int32)
        index = index + first.to(table.device)[:, None]
    return table.flatten().index_select(0, index.flatten()).reshape(places.shape)
