"""viterbi: the cheapest path through a bit-shift trellis that ends where it began.

A path is a state of L bits for every place of a sequence. From a place to the one before it, the
state moves up by k bits, loses the highest and takes the k bits of that place as its lowest: a
place's state is its own k bits and those of the places that follow, so a window that slides over
the stored bits reads it. Every state stands for a value; a path costs the weighted squares of what
its values miss the targets by.

The Viterbi algorithm (1967) keeps, for every state, the cheapest path that leads to it: 2^L steps a
place. The last places' windows reach into the first (tail-biting), which couples both ends. As in
QTIP (Tseng et al., 2024, arXiv:2406.11235) a first run over the sequence turned by half of it
decides the bits at the seam, a second run is held to them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from compress_methods.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

Encoder = Callable[["Tensor", "Tensor", "Tensor", int], "Tensor"]
FASTER: dict[str, Encoder] = {}
"""Encoders that kernels bring, by the type of the device they run on."""
SEQUENCES = 128
"""Sequences at a time, so that what is held of them stays below a gigabyte."""


def encode(targets: Tensor, weights: Tensor, values: Tensor, bits: int) -> Tensor:
    """uint8 [n, places]: the `bits` of every place.

    targets float32 [n, places]; weights [n, places], what a squared error counts; values float32
    [2^L], what a state stands for. `bits` * places is at least L.
    """
    return FASTER.get(targets.device.type, encode_in_torch)(targets, weights, values, bits)


def encode_in_torch(targets: Tensor, weights: Tensor, values: Tensor, bits: int) -> Tensor:
    """The same on any device."""
    parts = [
        _bitten(some.flip(1), by.flip(1), values, bits).flip(1)
        for some, by in zip(targets.split(SEQUENCES), weights.split(SEQUENCES), strict=True)
    ]
    return torch.cat(parts)


def _bitten(targets: Tensor, weights: Tensor, values: Tensor, bits: int) -> Tensor:
    """Of sequences in the order that states move in."""
    half = targets.shape[1] // 2
    free = _run(targets.roll(-half, 1), weights.roll(-half, 1), values, bits, None)
    seam = free[:, targets.shape[1] - half] >> bits
    return (_run(targets, weights, values, bits, seam) & (2**bits - 1)).to(torch.uint8)


def _run(
    targets: Tensor, weights: Tensor, values: Tensor, bits: int, seam: Tensor | None
) -> Tensor:
    """States int64 [n, places]; with `seam` [n], what comes before the first place and what the
    last place ends in."""
    count, places = targets.shape
    ways, kept = 2**bits, len(values) >> bits

    def costs(place: int) -> Tensor:
        missed = targets[:, place, None] - values
        return missed.square_().mul_(weights[:, place, None])

    total = costs(0)
    if seam is not None:
        starts = torch.arange(len(values), device=values.device) >> bits
        total[starts != seam[:, None]] = torch.inf
    came = torch.empty(places, count, kept, dtype=torch.uint8, device=values.device)
    for place in range(1, places):
        least, which = total.view(count, ways, kept).min(1)
        came[place] = which
        total = costs(place).view(count, kept, ways).add_(least[..., None]).flatten(1)
    if seam is None:
        state = total.argmin(1)
    else:
        ends = total.view(count, ways, kept)
        state = ends.gather(2, seam[:, None, None].expand(-1, ways, 1))[..., 0].argmin(1)
        state = state * kept + seam
    path = [state]
    for place in range(places - 1, 0, -1):
        before = state >> bits
        state = came[place].gather(1, before[:, None])[:, 0].long() * kept + before
        path.append(state)
    return torch.stack(path[::-1], 1)
