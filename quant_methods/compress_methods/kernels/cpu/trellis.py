"""Trellises as the CPU library reads them (`src/vector/trellis.h`), and its encoder.

A stored tile of 16 rows and columns keeps its bytes, in planes: the first two bytes of every lane,
then what is left of them. With 16 rows together a line is 8 tiles. Row by row it is the row's share
of 8 tiles, in the order 0, 2, 4, 6, 1, 3, 5, 7, which spares AVX2 a permutation; rows of a tile
that the matrix does not have are kept, since windows reach into them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress_methods.formats import MAIN_TENSOR, Stored
from compress_methods.formats.fitting.viterbi import FASTER, encode_in_torch
from compress_methods.formats.trellis import TILE, Trellis
from compress_methods.kernels.cpu.library import LINE, Kind, empty_bytes, library

LANES, WORD_BYTES = 2 * TILE, 2
TILES = LINE // TILE
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
KIND_BITS = 8


def lines(stored: Stored, together: int) -> Tensor:
    """uint8 [blocks, lines, bytes], or [rows, lines, bytes] where `together` is one."""
    fmt, packed = stored.format, stored.tensors[MAIN_TENSOR]
    assert isinstance(fmt, Trellis)
    blocks = len(packed)
    tiles = packed.reshape(blocks, -1, LANES, fmt.bits)
    tiles = torch.nn.functional.pad(tiles, (0, 0, 0, 0, 0, -tiles.shape[1] % TILES))
    count = tiles.shape[1] // TILES
    if together > 1:
        out = empty_bytes(blocks, count, TILES, LANES * fmt.bits)
        _planes(tiles.unflatten(1, (count, TILES)), out)
        return out.flatten(2)
    by_row = tiles.reshape(blocks, count, TILES, TILE, 2, fmt.bits)[:, :, list(ORDER)]
    by_row = by_row.permute(0, 3, 1, 2, 4, 5).reshape(blocks * TILE, count, LANES // 2, fmt.bits)
    out = empty_bytes(blocks * TILE, count, LANES // 2 * fmt.bits)
    _planes(by_row, out)
    return out


def _planes(lanes: Tensor, out: Tensor) -> None:
    """[..., lanes, bytes] into [..., lanes * bytes]."""
    words, rest = lanes[..., :WORD_BYTES].flatten(-2), lanes[..., WORD_BYTES:].flatten(-2)
    torch.cat([words, rest], -1, out=out)


def kind(fmt: Trellis) -> int:
    """What the library is told of a matrix: its kind, and above it the bits of a window."""
    return Kind.TRELLIS | fmt.state_bits << KIND_BITS


def encode(targets: Tensor, weights: Tensor, values: Tensor, bits: int) -> Tensor:
    """`formats.viterbi.encode` in C++, on torch's threads."""
    found = library()
    if found is None:
        return encode_in_torch(targets, weights, values, bits)
    # The library goes the way that states move, which is backwards.
    sequences = (x.flip(1).float().contiguous() for x in (targets, weights))
    return found.encode(*sequences, values.contiguous(), bits).flip(1)


FASTER["cpu"] = encode
