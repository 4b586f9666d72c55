"""gguf: quantized matrices of GGUF files, row by row in blocks.

Kinds whose scales are of 32 values are formats of ours; those of 16 are read as values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from compress_methods.checkpoint.interchange.base import Layout, register_layout
from compress_methods.checkpoint.interchange.gguf.blocks import KINDS
from compress_methods.checkpoint.interchange.gguf.entries import METHOD, GgufEntry
from compress_methods.checkpoint.interchange.parts.groups import DENSE
from compress_methods.checkpoint.safetensors import Entry
from compress_methods.formats import Format


@register_layout
@dataclass(frozen=True)
class Gguf(Layout):
    """Of entries that `entries.py` has named."""

    name: ClassVar[str] = METHOD

    def modules(self, entries: Mapping[str, Entry]) -> dict[str, tuple[int, int]]:
        return {
            name.removesuffix(".weight"): (entry.shape[0], entry.cols)
            for name, entry in entries.items()
            if isinstance(entry, GgufEntry) and entry.kind in KINDS
        }

    def names(self, module: str, entries: Mapping[str, Entry]) -> list[str]:
        return [f"{module}.weight"]

    def format(self, module: str, entries: Mapping[str, Entry]) -> Format | None:
        entry = entries[f"{module}.weight"]
        assert isinstance(entry, GgufEntry)
        return KINDS[entry.kind].format

    def read(self, module: str, entries: Mapping[str, Entry]) -> tuple[Format, Any]:
        entry = entries[f"{module}.weight"]
        assert isinstance(entry, GgufEntry)
        kind = KINDS[entry.kind]
        blocks = entry.read().reshape(-1, kind.nbytes)
        if kind.format is not None:
            return kind.format, kind.solution(blocks, entry.shape[0])
        assert kind.values is not None
        return DENSE, kind.values(blocks).reshape(entry.shape[0], entry.cols)
