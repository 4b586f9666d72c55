"""From stored pieces to the runtime parameters of a layer: joined where possible, prepared by the
best kernel, registered."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from logging import getLogger

import torch
from torch.nn import Module, Parameter

from compress_methods.errors import CheckpointError, FormatError
from compress_methods.formats import MAIN_TENSOR, Stored
from compress_methods.kernels import Prepared, Want, dispatch
from compress_methods.kernels.base import ZEROS
from vllm_compress.kernels import (  # noqa: F401  (enter vLLM's kernels in the table)
    from_vllm,
    from_vllm_floats,
)
from vllm_compress.kernels.ops import forced_kernel
from vllm_compress.names import KERNEL_VARIABLE

logger = getLogger("vllm.vllm_compress")


def join(pieces: Sequence[Stored]) -> list[Stored]:
    """One matrix out of several with the same columns, where the format's tensors allow it."""
    sizes = [piece.size[0] for piece in pieces]
    if len(pieces) < 2 or not all(piece.cuts_rows and piece.cuts_cols for piece in pieces):
        return list(pieces)
    fmt, shape = pieces[0].format, (sum(sizes), pieces[0].size[1])
    try:
        unit = fmt.alignment(sizes[0], shape[1])[0]
        specs = fmt.tensors(*shape)
    except FormatError:
        return list(pieces)
    if any(rows % unit for rows in sizes[:-1]):
        return list(pieces)
    joined = {}
    for name, spec in specs.items():
        tensors = [piece.tensors[name] for piece in pieces]
        if spec.rows_axis is not None:
            joined[name] = torch.cat(tensors, spec.rows_axis.axis)
        elif all(torch.equal(tensors[0], other) for other in tensors[1:]):
            joined[name] = tensors[0]
        else:
            return list(pieces)
        if tuple(joined[name].shape) != spec.shape:
            return list(pieces)
    return [Stored.whole(fmt, joined, shape)]


def prepare(pieces: Sequence[Stored], want: Want) -> Prepared:
    """Runtime form of the pieces, one below the other, each by the best kernel for its device; or
    the one that the environment names, else `want`."""
    name = forced_kernel()
    if name is not None and name not in dispatch.kernel_names():
        ours = (known for known in dispatch.kernel_names() if not known.startswith("vllm"))
        raise CheckpointError(
            f"{KERNEL_VARIABLE} is {name!r}, expected vllm or one of {', '.join(ours)}"
        )
    want = replace(want, kernel=name or want.kernel)
    held = [piece for piece in pieces if piece.size[0]]
    if not held:
        return Prepared(ZEROS, want.pad, pieces[0].size[1])
    if len(held) == 1:
        prepared = dispatch.prepare(held[0], want)
    else:
        own = replace(want, host=None, pad=0)
        parts = [dispatch.prepare(piece, own) for piece in held]
        if want.pad:
            parts.append(Prepared(ZEROS, want.pad, parts[0].cols))
        prepared = dispatch.side_by_side(parts)
    if name is None and "reference" in _kernels(prepared):
        _warn_slow(held[0].format.describe(), held[0].device.type)
    return prepared


def _kernels(prepared: Prepared) -> set[str]:
    return {prepared.kernel, *(name for part in prepared.parts for name in _kernels(part))}


@lru_cache
def _warn_slow(kind: str, device: str) -> None:
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        logger.warning(
            "no fast kernel for %s on %s: it is unpacked at every use, in plain torch", kind, device
        )


def remove(layer: Module, names: Sequence[str]) -> None:
    """Take the placeholders away."""
    for name in names:
        delattr(layer, name)


def install(layer: Module, prepared: Prepared) -> list[str]:
    """Make the runtime tensors parameters of the layer; their names in order. The main one may be
    that of a kernel of vLLM's, which has registered it already."""
    tensors, free = prepared.flat(), not hasattr(layer, MAIN_TENSOR)
    names = [MAIN_TENSOR if free and i == 0 else f"{MAIN_TENSOR}_{i}" for i in range(len(tensors))]
    for name, tensor in zip(names, tensors, strict=True):
        layer.register_parameter(name, Parameter(tensor, requires_grad=False))
    if not names and not hasattr(layer, MAIN_TENSOR):
        layer.register_parameter(MAIN_TENSOR, Parameter(torch.empty(0), requires_grad=False))
    return names


def share(layer: Module, owner: Module) -> None:
    """Register the runtime tensors of one layer with another that computes with them too."""
    for name, tensor in owner.named_parameters(recurse=False):
        if name.startswith(MAIN_TENSOR):
            layer.register_parameter(name, tensor)
