"""Tensors that transformers divides by rows while it loads them: `Wqkv` of a NomicBERT into
queries, keys and values, `up_gate_proj` of a GTE into the two matrices.

They are read as if the checkpoint held the parts, under the names of the model's parameters; and so
a conversion writes them. What another tool quantized is not divided.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from compress_methods.checkpoint.interchange.base import DecodedEntry
from compress_methods.checkpoint.safetensors import Entry
from compress_methods.model.skeleton import Skeleton, name_variants


@dataclass(frozen=True)
class RowsEntry(Entry):
    """Rows of a stored tensor, from `offset` on."""

    whole: Entry = None  # type: ignore[assignment]
    offset: int = 0

    def read_into(self, out: Tensor, first: int = 0) -> Tensor:
        return self.whole.read_into(out, self.offset + first)


def divided(skeleton: Skeleton, entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """The tensors of a checkpoint, parts in place of those that hold several parameters."""
    found, cut = dict(entries), set[str]()
    for parameter in skeleton.parameter_names():
        whole = skeleton.stored_names.whole(parameter)
        if whole is None or parameter in entries:
            continue
        stored, index, count = whole
        name = next((v for v in name_variants(skeleton, stored) if v in entries), None)
        if name is None or isinstance(entries[name], DecodedEntry) or entries[name].rows % count:
            continue
        found[parameter] = _part(entries[name], parameter, index, count)
        cut.add(name)
    return {name: entry for name, entry in found.items() if name not in cut}


def _part(whole: Entry, name: str, index: int, count: int) -> RowsEntry:
    rows, nbytes = whole.rows // count, whole.nbytes // count
    shape = (rows, *whole.shape[1:])
    return RowsEntry(name, whole.path, shape, whole.dtype, 0, nbytes, whole, index * rows)
