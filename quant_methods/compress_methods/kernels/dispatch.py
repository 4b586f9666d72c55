"""The one table of kernels at work: choose by rank, prepare, multiply, look up.

Every entry of the table is asked how it ranks for a stored matrix; the highest wins. Entries are
ours, torch's, those the plugin enters for vLLM's own kernels, and other distributions'.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from compress_methods.errors import FormatError
from compress_methods.formats import Stored
from compress_methods.kernels.base import (
    KERNELS,
    ZEROS,
    Kernel,
    Prepared,
    Want,
    check_product,
)

SIDE_BY_SIDE = "side_by_side"
PLAIN = Want()


@cache
def kernel(name: str) -> Kernel:
    """The kernel of that name; they have no state, so one of each is enough."""
    return KERNELS.get(name, "kernels", FormatError)()


def kernel_names() -> list[str]:
    """What `Want.kernel` may name."""
    names = [name for name in KERNELS if name not in (SIDE_BY_SIDE, ZEROS)]
    return sorted({*names, *(alias for name in names for alias in kernel(name).answers_to)})


def choose(stored: Stored, want: Want = PLAIN) -> Kernel:
    """The kernel that `want` names, if it can do this, else the highest rank."""
    ranks = {name: kernel(name).rank(stored, want) for name in KERNELS}
    able = [name for name, rank in ranks.items() if rank is not None]
    if not able:
        raise FormatError(
            f"no kernel multiplies {stored.format.describe()} {list(stored.size)} "
            f"on {stored.device.type}"
        )
    named = [name for name in able if kernel(name).wanted(want)]
    return kernel(max(named or able, key=lambda name: ranks[name] or 0))


def prepare(stored: Stored, want: Want = PLAIN) -> Prepared:
    """Runtime form of a stored matrix, by the kernel chosen for it."""
    if 0 in stored.size:  # an empty sum, for which no kernel needs to have a layout
        return Prepared(ZEROS, stored.size[0] + want.pad, stored.size[1])
    chosen = choose(stored, want)
    prepared = chosen.prepare(stored, want)
    if want.pad and not chosen.pads:
        zeros = Prepared(ZEROS, want.pad, prepared.cols)
        return side_by_side([prepared, zeros])
    return prepared


def side_by_side(parts: Sequence[Prepared]) -> Prepared:
    """Matrices with the same columns as one, whose outputs follow one another."""
    if len(parts) == 1:
        return parts[0]
    return Prepared(
        SIDE_BY_SIDE, sum(part.rows for part in parts), parts[0].cols, parts=tuple(parts)
    )


def matmul(x: Tensor, prepared: Prepared, bias: Tensor | None = None) -> Tensor:
    """[..., cols] -> [..., rows], in the dtype of `x`."""
    check_product(x, prepared, bias)
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    if not len(flat):
        return x.new_empty(*x.shape[:-1], prepared.rows)
    out = kernel(prepared.kernel).matmul(flat, prepared, bias)
    return out.reshape(*x.shape[:-1], prepared.rows)


def embed(ids: Tensor, prepared: Prepared, dtype: torch.dtype) -> Tensor:
    """Rows `ids` [...] of the matrix -> [..., cols] in `dtype`."""
    if not ids.numel():
        return torch.empty(*ids.shape, prepared.cols, dtype=dtype, device=ids.device)
    out = kernel(prepared.kernel).embed(ids.reshape(-1), prepared)
    return out.to(dtype).reshape(*ids.shape, prepared.cols)
