"""gptq: what AutoGPTQ, GPTQModel and optimum write.

Stored, for a [rows, cols] matrix of b bits (2, 3, 4 or 8):

  qweight  int32 [cols*b/32, rows]   codes of a row's columns in one stream of bits down each column
  qzeros   int32 [groups, rows*b/32] zero points, the same along rows; version 1 (`gptq`) stores
                                     them less one, version 2 (`gptq_v2`) as they are
  scales   float16 [groups, rows]
  g_idx    int32 [cols]              the group of each column; not in order with `desc_act`

value = scale * (code - zero). `bits` of config.json may differ by module (`dynamic`), so it is
taken from the shapes. Written in version 1 where groups are symmetric, which every reader takes, in
version 2 where they are not: a zero point of 0 has no place in version 1. (Frantar et al., 2022,
arXiv:2210.17323; the words: AutoGPTQ.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from compress_methods.checkpoint.interchange.base import Layout, register_layout
from compress_methods.checkpoint.interchange.parts.groups import Groups
from compress_methods.checkpoint.interchange.parts.words import WORD, pack_stream, unpack_stream
from compress_methods.checkpoint.quantization_config import CompressionSpec
from compress_methods.checkpoint.safetensors import Entry
from compress_methods.errors import CheckpointError, FormatError
from compress_methods.formats import Format, Stored, TensorSpec
from compress_methods.formats.integer import Integer
from compress_methods.formats.wrappers.reordered import Reordered, ReorderedSolution
from compress_methods.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

WEIGHT, ZEROS, SCALES, GROUP_OF = "qweight", "qzeros", "scales", "g_idx"
BITS = (2, 3, 4, 8)
SECOND = "gptq_v2"


@register_layout
@dataclass(frozen=True)
class Gptq(Layout):
    """Versions 1 and 2, `desc_act` and asymmetric groups included."""

    name: ClassVar[str] = "gptq"

    def modules(self, entries: Mapping[str, Entry]) -> dict[str, tuple[int, int]]:
        version = self.block.get("checkpoint_format") or self.name
        if version not in (self.name, SECOND):
            raise CheckpointError(
                f"quantization_config: checkpoint_format is {version!r}, expected {self.name!r} or "
                f"{SECOND!r}"
            )
        tail = f".{WEIGHT}"
        named = [name.removesuffix(tail) for name in entries if name.endswith(tail)]
        return {m: (entries[f"{m}{tail}"].shape[1], self._cols(m, entries)) for m in named}

    def names(self, module: str, entries: Mapping[str, Entry]) -> list[str]:
        every = (f"{module}.{leaf}" for leaf in (WEIGHT, ZEROS, SCALES, GROUP_OF))
        return [name for name in every if name in entries]

    def format(self, module: str, entries: Mapping[str, Entry]) -> Format | None:
        return self._groups(module, entries).format()

    def read(self, module: str, entries: Mapping[str, Entry]) -> tuple[Format, Any]:
        groups = self._groups(module, entries)
        words = entries[f"{module}.{WEIGHT}"].read()
        codes = unpack_stream(words.T.contiguous(), groups.bits)[:, : groups.cols]
        return groups.read(codes)

    def specs(self, module: str, fmt: Format, rows: int, cols: int) -> dict[str, TensorSpec]:
        base = _written(module, fmt)
        base.check_shape(rows, cols)
        if rows * base.bits % WORD:
            raise FormatError(f"{module}: {rows} rows of {base.bits} bits fill no whole words")
        groups = base.groups(cols)
        specs = {
            WEIGHT: TensorSpec((cols * base.bits // WORD, rows), "int32"),
            ZEROS: TensorSpec((groups, rows * base.bits // WORD), "int32"),
            SCALES: TensorSpec((groups, rows), "float16"),
            GROUP_OF: TensorSpec((cols,), "int32"),
        }
        return {f"{module}.{leaf}": spec for leaf, spec in specs.items()}

    def write(self, module: str, stored: Stored) -> dict[str, Tensor]:
        fmt = _written(module, stored.format)
        solution = stored.format.solution(stored.tensors)
        order = torch.arange(stored.shape[1])
        if isinstance(solution, ReorderedSolution):
            solution, order = solution.base, solution.order
        scales = solution.scales.half()
        if not torch.equal(scales.float(), solution.scales.float()):
            raise FormatError(f"{module}: scales are not float16; give scale_dtype: float16")
        zeros = solution.zeros
        if zeros is None:
            zeros = torch.full_like(scales, fmt.middle - 1, dtype=torch.uint8)
        places = torch.arange(len(order)) // (len(order) // scales.shape[1])
        group_of, codes = torch.empty_like(order), torch.empty_like(solution.codes)
        group_of[order], codes[:, order] = places, solution.codes
        return {
            f"{module}.{WEIGHT}": pack_stream(codes, fmt.bits).T.contiguous(),
            f"{module}.{ZEROS}": pack_stream(zeros.T, fmt.bits),
            f"{module}.{SCALES}": scales.T.contiguous(),
            f"{module}.{GROUP_OF}": group_of.int(),
        }

    def config(self, spec: CompressionSpec) -> dict[str, Any]:
        formats = set(spec.formats.values())
        if len(formats) > 1:
            several = ", ".join(sorted(fmt.describe() for fmt in formats))
            raise FormatError(f"gptq holds one format, the recipe has {several}")
        (found,) = formats
        fmt = _written("the result", found)
        return {
            "quant_method": self.name,
            "bits": fmt.bits,
            "group_size": fmt.group_size,
            "desc_act": isinstance(found, Reordered),
            "sym": fmt.symmetric,
            "lm_head": any(spec.format_for(name) for name in ("lm_head", "embed_out")),
            "checkpoint_format": self.name if fmt.symmetric else SECOND,
            "pack_dtype": "int32",
        }

    def _groups(self, module: str, entries: Mapping[str, Entry]) -> Groups:
        bits, cols = self._bits(module, entries), self._cols(module, entries)
        scales = self.needed(module, SCALES, entries).read()
        zeros = unpack_stream(self.needed(module, ZEROS, entries).read(), bits).int()
        if self.block.get("checkpoint_format", self.name) != SECOND:
            zeros += 1
        places = entries.get(f"{module}.{GROUP_OF}")
        group_of: Tensor | None = None if places is None else places.read().long()
        rows = entries[f"{module}.{WEIGHT}"].shape[1]
        return Groups(bits, cols, scales.T, zeros[:, :rows].T, group_of, size=self._size(cols))

    def _size(self, cols: int) -> int:
        size = self.block.get("group_size", -1)
        return size if isinstance(size, int) and 0 < size < cols else 0

    def _bits(self, module: str, entries: Mapping[str, Entry]) -> int:
        words, cols = entries[f"{module}.{WEIGHT}"].shape[0], self._cols(module, entries)
        for bits in BITS:
            if words * WORD == cols * bits:
                return bits
        raise CheckpointError(
            f"{module}.{WEIGHT}: {words} words for {cols} columns, expected those of 2, 3, 4 or "
            "8 bits"
        )

    def _cols(self, module: str, entries: Mapping[str, Entry]) -> int:
        places = entries.get(f"{module}.{GROUP_OF}")
        if places is not None:
            return places.shape[0]
        bits = self.block.get("bits")
        if bits not in BITS:
            raise CheckpointError(
                f"quantization_config: bits is {bits!r}, expected one of 2, 3, 4, 8"
            )
        return entries[f"{module}.{WEIGHT}"].shape[0] * WORD // bits


def _written(module: str, fmt: Format) -> Integer:
    """The integers that a format stores; `FormatError` where this layout has no equal."""
    base = fmt.base if isinstance(fmt, Reordered) else fmt
    plain = isinstance(base, Integer) and base.activations is None and base.holds_zero
    if not isinstance(base, Integer) or not plain or base.bits not in BITS:
        raise FormatError(f"{module}: {fmt.describe()} has no equal in gptq")
    return base
