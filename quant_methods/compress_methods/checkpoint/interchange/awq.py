"""awq: what AutoAWQ and GPTQModel write for its `gemm` kernel.

Stored, for a [rows, cols] matrix of 4 bits:

  qweight  int32 [cols, rows/8]    eight neighbouring rows to a word, in the order 0 2 4 6 1 3 5 7
  qzeros   int32 [groups, rows/8]  zero points, in the same order
  scales   float16 [groups, rows]

value = scale * (code - zero). (Lin et al., 2023, arXiv:2306.00978; the order is that in which a
GPU's half-precision instructions find them.) Other `version`s (`gemv`, `gemv_fast`) have other
shapes and are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from compress_methods.checkpoint.interchange.base import Layout, register_layout
from compress_methods.checkpoint.interchange.parts.groups import Groups
from compress_methods.checkpoint.interchange.parts.words import unpack_stream
from compress_methods.checkpoint.safetensors import Entry
from compress_methods.errors import CheckpointError
from compress_methods.formats import Format

if TYPE_CHECKING:
    from torch import Tensor

WEIGHT, ZEROS, SCALES = LEAVES = ("qweight", "qzeros", "scales")
PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word each of eight rows is."""
BITS, EACH = 4, 8
VERSION = "gemm"


@register_layout
@dataclass(frozen=True)
class Awq(Layout):
    """Version `gemm`, 4 bits."""

    name: ClassVar[str] = "awq"

    def modules(self, entries: Mapping[str, Entry]) -> dict[str, tuple[int, int]]:
        version = self.block.get("version") or self.block.get("checkpoint_format") or VERSION
        bits = self.block.get("bits", BITS)
        if str(version).lower() != VERSION or bits != BITS:
            raise CheckpointError(
                f"quantization_config: version is {version!r} with {bits} bits, expected "
                f"{VERSION!r} with {BITS}"
            )
        tail = f".{WEIGHT}"
        found = {n.removesuffix(tail): e.shape for n, e in entries.items() if n.endswith(tail)}
        return {module: (words * EACH, cols) for module, (cols, words) in found.items()}

    def names(self, module: str, entries: Mapping[str, Entry]) -> list[str]:
        missing = next((x for x in LEAVES if f"{module}.{x}" not in entries), None)
        if missing is not None:
            raise CheckpointError(f"{module}.{missing} is missing")
        return [f"{module}.{leaf}" for leaf in LEAVES]

    def format(self, module: str, entries: Mapping[str, Entry]) -> Format | None:
        return self._groups(module, entries).format()

    def read(self, module: str, entries: Mapping[str, Entry]) -> tuple[Format, Any]:
        words = entries[f"{module}.{WEIGHT}"].read()
        return self._groups(module, entries).read(_rows(words).T.contiguous())

    def _groups(self, module: str, entries: Mapping[str, Entry]) -> Groups:
        zeros, scales = (entries[f"{module}.{leaf}"].read() for leaf in (ZEROS, SCALES))
        cols = entries[f"{module}.{WEIGHT}"].shape[0]
        return Groups(BITS, cols, scales.T, _rows(zeros).T.int())


def _rows(words: Tensor) -> Tensor:
    """uint8 [n, rows] of int32 [n, rows/8]."""
    return unpack_stream(words, BITS).unflatten(1, (-1, EACH))[..., list(PLACES)].flatten(1)
