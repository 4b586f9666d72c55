"""The tensors of GGUF files as transformers' model names, orders and shifts them.

llama.cpp stores rows of q and k in another order for `llama` (the two halves that rotary embeddings
turn are interleaved), and adds 1 to the norms of Gemma and Nemotron. Both are undone here, on bytes
where they are rows, so that what was quantized stays what it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress_methods.checkpoint.interchange.gguf.blocks import EXPECTED, KINDS, PLAIN
from compress_methods.checkpoint.interchange.gguf.container import Described, read_gguf
from compress_methods.checkpoint.safetensors import Entry
from compress_methods.errors import CheckpointError
from compress_methods.formats import ITEMSIZE
from compress_methods.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

METHOD = "gguf"


@dataclass(frozen=True)
class GgufEntry(Entry):
    """A tensor of a GGUF file: floats, or the bytes of quantized rows. `kind`: a key of `KINDS`, or
    -1; `cols` that the bytes of a row hold. `heads`: whose rows are interleaved, 0 where none are;
    `less`: what its values have been raised by."""

    kind: int = -1
    cols: int = 0
    heads: int = 0
    less: float = 0.0

    def read_into(self, out: Tensor, first: int = 0) -> Tensor:
        if not self.heads:
            super().read_into(out, first)
            return out.sub_(self.less) if self.less else out
        whole = super().read_into(torch.empty(self.shape, dtype=out.dtype))
        pairs = whole.unflatten(0, (self.heads, -1, 2)).transpose(1, 2)
        return out.copy_(pairs.reshape(self.shape)[first : first + len(out)])


def gguf_entries(block: Mapping[str, Any]) -> dict[str, Entry]:
    """Tensors by transformers' names, as the `quantization_config` that `unfold` wrote says."""
    entries: dict[str, Entry] = {}
    changes = block.get("changes") or {}
    for file in block["files"]:
        for theirs, found in read_gguf(Path(file))[1].items():
            name = block["names"].get(theirs)
            if name is not None:
                entries[name] = entry_of(name, found, **changes.get(theirs, {}))
    return entries


def entry_of(name: str, found: Described, heads: int = 0, less: float = 0.0) -> GgufEntry:
    """A tensor under the name `name`; `CheckpointError` for a kind that is not read, or bytes that
    the file does not have."""
    kind = KINDS.get(found.kind)
    if kind is None and found.kind not in PLAIN:
        raise CheckpointError(
            f"{found.path}: {name} is of GGUF type {found.kind}, expected one of {EXPECTED}"
        )
    shape, dtype, cols = found.shape, PLAIN.get(found.kind, "uint8"), 0
    if kind is not None:
        *outer, cols = shape
        if cols % kind.size:
            raise CheckpointError(
                f"{found.path}: {name} has {cols} columns, no multiple of {kind.size} ({kind.name})"
            )
        shape = (*outer, cols // kind.size * kind.nbytes)
    nbytes = math.prod(shape) * ITEMSIZE[dtype]
    if found.start + nbytes > found.path.stat().st_size:
        raise CheckpointError(f"{found.path}: cut off; {name} ends at {found.start + nbytes}")
    number = -1 if kind is None else found.kind
    return GgufEntry(name, found.path, shape, dtype, found.start, nbytes, number, cols, heads, less)


def require_known(names: Sequence[str], path: Path) -> None:
    """`CheckpointError` for tensors that have no name in transformers' model."""
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise CheckpointError(f"{path}: {names[0]}{more} is no tensor of transformers' model")
