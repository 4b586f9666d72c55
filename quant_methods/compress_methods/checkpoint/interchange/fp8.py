"""fp8: E4M3 weights beside their scales, as DeepSeek-V3, Qwen3 and vLLM's own `fp8` have them.

Stored, for a [rows, cols] matrix:

  weight            float8_e4m3fn [rows, cols]
  weight_scale_inv  float32 [rows/128, cols/128], a scale for a block (`weight_block_size`); or
  weight_scale      one scale of the tensor, or one of each row

value = scale * float: `inv` is the inverse of what weights were multiplied by. (DeepSeek-AI, 2024,
arXiv:2412.19437, section 3.3.) `fbgemm_fp8` has a scale for each row. Inputs that are quantized
with a scale of their own for each token (`dynamic`) stay so; static scales of inputs are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from compress_methods.checkpoint.interchange.base import Layout, register_layout
from compress_methods.checkpoint.interchange.parts.float_groups import fp8_format, read_fp8
from compress_methods.checkpoint.safetensors import Entry
from compress_methods.errors import CheckpointError
from compress_methods.formats import Format
from compress_methods.formats.floats import FP8

WEIGHT, E4M3 = "weight", "float8_e4m3fn"
SCALES = ("weight_scale_inv", "weight_scale")
UNUSED = ("input_scale", "input_scale_ub", "activation_scale")


@register_layout
@dataclass(frozen=True)
class Fp8(Layout):
    """Blocks, rows and whole tensors."""

    name: ClassVar[str] = "fp8"

    def modules(self, entries: Mapping[str, Entry]) -> dict[str, tuple[int, int]]:
        found = {}
        for name, entry in entries.items():
            module, _, leaf = name.rpartition(".")
            if leaf == WEIGHT and entry.dtype == E4M3:
                rows, cols = entry.shape
                found[module] = (rows, cols)
        return found

    def names(self, module: str, entries: Mapping[str, Entry]) -> list[str]:
        unused = [n for leaf in UNUSED if (n := f"{module}.{leaf}") in entries]
        return [f"{module}.{WEIGHT}", self._scales(module, entries).name, *unused]

    def format(self, module: str, entries: Mapping[str, Entry]) -> Format | None:
        scales = self._scales(module, entries).read()
        rows, cols = entries[f"{module}.{WEIGHT}"].shape
        return fp8_format((rows, cols), scales, self.size, self.activations)

    def read(self, module: str, entries: Mapping[str, Entry]) -> tuple[Format, Any]:
        weight, scales = entries[f"{module}.{WEIGHT}"].read(), self._scales(module, entries).read()
        return read_fp8(weight, scales, self.size, self.activations)

    def _scales(self, module: str, entries: Mapping[str, Entry]) -> Entry:
        for leaf in SCALES:
            if f"{module}.{leaf}" in entries:
                return entries[f"{module}.{leaf}"]
        raise CheckpointError(f"{module}.{SCALES[0]} is missing")

    @property
    def size(self) -> tuple[int, int] | None:
        """Of a block."""
        found = self.block.get("weight_block_size")
        return (int(found[0]), int(found[1])) if found else None

    @property
    def activations(self) -> str | None:
        return FP8 if self.block.get("activation_scheme") == "dynamic" else None


@register_layout
@dataclass(frozen=True)
class FbgemmFp8(Fp8):
    """A scale for each row."""

    name: ClassVar[str] = "fbgemm_fp8"

    @property
    def activations(self) -> str | None:
        return FP8
