"""hqq: half-quadratic quantization, as transformers' `save_pretrained` writes it.

Stored, for a [rows, cols] matrix cut into groups along its rows (`axis` 1) or columns (0):

  W_q    codes of 8, 4, 2 or 1 bits: uint8, the first half (quarter, ...) of all groups in the high
         bits; of 3 bits int32, ten to a word
  scale  float of each group, zero  float of each group
  shape, nbits, group_size, axis, packing  and further settings, a number or text in a tensor each

value = scale * (code - zero). Zero points are no whole numbers unless asked for (`round_zero`):
groups in rows are then format `shifted`, whose offset is -scale * zero in float32, exact for scales
and zero points of 16 bits; others are `integer`. (Badri and Shaji, 2023,
mobiusml.github.io/hqq_blog.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from compress_methods.checkpoint.interchange.base import Layout, register_layout
from compress_methods.checkpoint.interchange.parts.groups import DENSE, Groups
from compress_methods.checkpoint.safetensors import Entry
from compress_methods.errors import CheckpointError
from compress_methods.formats import Format
from compress_methods.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

WEIGHT = "W_q"
NEEDED = ("scale", "zero", "shape", "nbits", "group_size", "axis", "packing")
OTHERS = (
    "unpack_view_dtype", "view_as_float", "quant_scale", "quant_zero", "compute_dtype",
    "offload_meta", "encoded_state_dict", "stores_quant_config", "channel_wise", "optimize",
    "round_zero", "zero_scale",
)  # fmt: skip
PACKINGS = {"8bit_u8": (8, 1), "4bit_u8": (4, 2), "3bit_32": (3, 10), "2bit_u8": (2, 4)}
PACKINGS["1bit_u8"] = (1, 8)
"""Bits of a code, and how many are in a word."""


@register_layout
@dataclass(frozen=True)
class Hqq(Layout):
    """Any bits and axis."""

    name: ClassVar[str] = "hqq"

    def modules(self, entries: Mapping[str, Entry]) -> dict[str, tuple[int, int]]:
        tail = f".{WEIGHT}"
        named = [name.removesuffix(tail) for name in entries if name.endswith(tail)]
        found = {}
        for module in named:
            rows, cols = self.needed(module, "shape", entries).read().tolist()
            found[module] = (rows, cols)
        return found

    def names(self, module: str, entries: Mapping[str, Entry]) -> list[str]:
        leaves = (WEIGHT, *NEEDED, *OTHERS)
        return [name for leaf in leaves if (name := f"{module}.{leaf}") in entries]

    def format(self, module: str, entries: Mapping[str, Entry]) -> Format | None:
        groups = self._groups(module, entries)
        return None if groups is None else groups.format()

    def read(self, module: str, entries: Mapping[str, Entry]) -> tuple[Format, Any]:
        shape = tuple(self.needed(module, "shape", entries).read().tolist())
        codes = self._codes(module, entries)
        groups = self._groups(module, entries)
        if groups is not None:
            return groups.read(codes.reshape(shape))
        scale, zero = (
            self.needed(module, leaf, entries).read().float() for leaf in ("scale", "zero")
        )
        return DENSE, ((codes.float() - zero) * scale).reshape(shape)

    def _codes(self, module: str, entries: Mapping[str, Entry]) -> Tensor:
        """uint8 [groups, size] (`axis` 1) or [size, groups]."""
        text = "".join(map(chr, self.needed(module, "packing", entries).read().tolist()))
        if text not in PACKINGS:
            raise CheckpointError(f"{module}: packing is {text!r}, expected {', '.join(PACKINGS)}")
        bits, each = PACKINGS[text]
        words = self.needed(module, WEIGHT, entries).read()
        if words.is_floating_point():  # bytes under the name of a float
            words = words.view(torch.int32 if bits == 3 else torch.uint8)
        shifts = [bits * (each - 1 - place) for place in range(each)]
        lanes = [((words >> shift) & (2**bits - 1)).to(torch.uint8) for shift in shifts]
        return torch.cat(lanes)[: self._count(module, entries)]

    def _count(self, module: str, entries: Mapping[str, Entry]) -> int:
        """Rows of the codes, without those that fill words."""
        size = int(self.needed(module, "group_size", entries).read())
        rows, cols = self.needed(module, "shape", entries).read().tolist()
        return (
            rows * cols // size if int(self.needed(module, "axis", entries).read()) == 1 else size
        )

    def _groups(self, module: str, entries: Mapping[str, Entry]) -> Groups | None:
        """What a format of ours may hold: groups in rows."""
        rows, cols = self.needed(module, "shape", entries).read().tolist()
        size = int(self.needed(module, "group_size", entries).read())
        if int(self.needed(module, "axis", entries).read()) != 1 or cols % size:
            return None
        scale, zero = (
            self.needed(module, leaf, entries).read().float() for leaf in ("scale", "zero")
        )
        bits = int(self.needed(module, "nbits", entries).read())
        scales, zeros = (t.reshape(rows, cols // size) for t in (scale, zero))
        if torch.equal(zero, zero.round()) and 0 <= float(zero.min()) <= zero.max() < 256:
            return Groups(bits, cols, scales, zeros.int())
        return Groups(bits, cols, scales, offsets=-scales * zeros)
