"""compressed-tensors: what llm-compressor writes, and others that use its library.

Stored, for a [rows, cols] matrix, as the `format` of its group of `config_groups` says:

  pack-quantized        weight_packed int32 [rows, ...], codes of 1 to 8 bits, lowest bits first;
                        weight_scale [rows, groups]; weight_zero_point int32 [..., groups], packed
                        along rows; weight_g_idx [cols] (`actorder: group`); weight_shape
  int-quantized         weight int8 [rows, cols]; weight_scale; weight_zero_point int8
  float-quantized       weight float8_e4m3fn; weight_scale of the tensor, rows, groups or blocks
  nvfp4-pack-quantized  weight_packed uint8 [rows, cols/2], neighbours in a byte, the first low;
                        weight_scale float8_e4m3fn [rows, cols/16]; weight_global_scale float32
  mxfp4-pack-quantized  weight_packed likewise; weight_scale uint8 [rows, cols/32], exponents

value = scale * (code - zero), or scale * float. Integers are stored with 2^(bits - 1) added where
they are packed. The scale of `nvfp4` is multiplied with the reciprocal of the global scale, in
float32, as servers do (the library divides: the last bit of a float32 may differ). Inputs that are
quantized with a scale for each token stay so; static scales of inputs are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from compress_methods.checkpoint.interchange.base import Layout, register_layout
from compress_methods.checkpoint.interchange.compressed_tensors import writing
from compress_methods.checkpoint.interchange.parts.float_groups import fp8_format, read_fp8
from compress_methods.checkpoint.interchange.parts.groups import Groups
from compress_methods.checkpoint.interchange.parts.words import unpack_words
from compress_methods.checkpoint.quantization_config import CompressionSpec
from compress_methods.checkpoint.safetensors import Entry
from compress_methods.errors import CheckpointError
from compress_methods.formats import Format, Stored, TensorSpec
from compress_methods.formats.encoding.small_floats import decode_e8m0
from compress_methods.formats.floats import FP8, MXFP4, NVFP4, Float, FloatSolution
from compress_methods.lazy import torch
from compress_methods.system.pattern import PatternError, matches_whole

if TYPE_CHECKING:
    from torch import Tensor

PACKED, WEIGHT, SCALE, SHAPE = "weight_packed", "weight", "weight_scale", "weight_shape"
ZERO, GROUP_OF, GLOBAL = "weight_zero_point", "weight_g_idx", "weight_global_scale"
UNUSED = ("input_scale", "input_zero_point", "input_global_scale", "output_scale")
LEAVES = (PACKED, WEIGHT, SCALE, SHAPE, ZERO, GROUP_OF, GLOBAL, *UNUSED)


@register_layout
@dataclass(frozen=True)
class CompressedTensors(Layout):
    """Integers and floats, weights alone or with inputs."""

    name: ClassVar[str] = "compressed-tensors"

    def modules(self, entries: Mapping[str, Entry]) -> dict[str, tuple[int, int]]:
        found = {}
        for name, entry in entries.items():
            module, _, leaf = name.rpartition(".")
            if leaf == PACKED and entry.dtype == "uint8":
                found[module] = (entry.shape[0], 2 * entry.shape[1])
            elif leaf == PACKED:
                rows, cols = self.needed(module, SHAPE, entries).read().tolist()
                found[module] = (rows, cols)
            elif leaf == WEIGHT and f"{module}.{SCALE}" in entries:
                found[module] = (entry.shape[0], entry.shape[1])
        return found

    def names(self, module: str, entries: Mapping[str, Entry]) -> list[str]:
        return [name for leaf in LEAVES if (name := f"{module}.{leaf}") in entries]

    def format(self, module: str, entries: Mapping[str, Entry]) -> Format | None:
        packed = entries.get(f"{module}.{PACKED}")
        if packed is not None and packed.dtype == "uint8":
            return self._float4(module, entries)
        weight = entries.get(f"{module}.{WEIGHT}")
        if weight is not None and weight.dtype != "int8":
            rows, cols = weight.shape
            scales = self.needed(module, SCALE, entries).read()
            return fp8_format((rows, cols), scales, self._block(module), self._inputs(module))
        return self._groups(module, entries).format()

    def read(self, module: str, entries: Mapping[str, Entry]) -> tuple[Format, Any]:
        packed = entries.get(f"{module}.{PACKED}")
        if packed is not None and packed.dtype == "uint8":
            return self._read_float4(module, entries, packed.read())
        if packed is not None:
            groups = self._groups(module, entries)
            return groups.read(unpack_words(packed.read(), groups.bits, groups.cols))
        weight = self.needed(module, WEIGHT, entries).read()
        if weight.dtype == torch.int8:
            groups = self._groups(module, entries)
            return groups.read((weight.short() + groups.middle).to(torch.uint8))
        scales = self.needed(module, SCALE, entries).read()
        if weight.dtype != torch.float8_e4m3fn:
            raise CheckpointError(f"{module}.{WEIGHT} is {weight.dtype}, expected int8 or E4M3")
        return read_fp8(weight, scales, self._block(module), self._inputs(module))

    def specs(self, module: str, fmt: Format, rows: int, cols: int) -> dict[str, TensorSpec]:
        return writing.specs(module, fmt, rows, cols)

    def write(self, module: str, stored: Stored) -> dict[str, Tensor]:
        return writing.write(module, stored)

    def config(self, spec: CompressionSpec) -> dict[str, Any]:
        return writing.config(spec)

    def _groups(self, module: str, entries: Mapping[str, Entry]) -> Groups:
        rows, cols = self.modules(self._own(module, entries))[module]
        bits = self._weights(module).get("num_bits")
        if not isinstance(bits, int) or not 1 <= bits <= 8:
            raise CheckpointError(f"{module}: num_bits is {bits!r}, expected 1 to 8")
        scales = self.needed(module, SCALE, entries).read()
        scales = scales.reshape(-1, 1) if scales.numel() in (1, rows) else scales
        scales = scales.expand(rows, -1)
        zeros = self._zeros(module, entries, bits, rows)
        places = entries.get(f"{module}.{GROUP_OF}")
        group_of = None if places is None else places.read().long()
        if group_of is not None and int(group_of.min()) < 0:  # never filled: columns as they lie
            group_of = None
        return Groups(bits, cols, scales, zeros, group_of, self._inputs(module))

    def _zeros(
        self, module: str, entries: Mapping[str, Entry], bits: int, rows: int
    ) -> Tensor | None:
        entry = entries.get(f"{module}.{ZERO}")
        if entry is None:
            return None
        zeros = entry.read()
        if entry.dtype == "int32" and f"{module}.{PACKED}" in entries:
            return unpack_words(zeros.T.contiguous(), bits, rows).T.int()
        zeros = zeros.reshape(-1, 1) if zeros.numel() in (1, rows) else zeros
        return zeros.int().expand(rows, -1) + 2 ** (bits - 1)

    def _float4(self, module: str, entries: Mapping[str, Entry]) -> Format | None:
        kind = NVFP4 if f"{module}.{GLOBAL}" in entries else MXFP4
        rows, half = entries[f"{module}.{PACKED}"].shape
        fmt = Float(kind)
        scales = self.needed(module, SCALE, entries).shape
        if scales != (rows, 2 * half // fmt.group_size):
            raise CheckpointError(
                f"{module}.{SCALE} is {list(scales)}, expected one for {fmt.group_size} columns "
                f"of [{rows}, {2 * half}]"
            )
        return fmt if 2 * half % 32 == 0 else None

    def _read_float4(
        self, module: str, entries: Mapping[str, Entry], packed: Tensor
    ) -> tuple[Format, Any]:
        fmt = self._float4(module, entries)
        if not isinstance(fmt, Float):
            raise CheckpointError(f"{module}: {2 * packed.shape[1]} columns, no multiple of 32")
        codes = torch.stack((packed & 15, packed >> 4), -1).flatten(1)
        scales = self.needed(module, SCALE, entries).read()
        if fmt.kind == MXFP4:
            return fmt, FloatSolution(codes, decode_e8m0(scales))
        whole = self.needed(module, GLOBAL, entries).read().float().reshape(-1)
        of_rows = whole.reciprocal().expand(len(codes)).contiguous()
        return fmt, FloatSolution(codes, scales.float(), of_rows)

    def _own(self, module: str, entries: Mapping[str, Entry]) -> dict[str, Entry]:
        return {name: entries[name] for name in self.names(module, entries)}

    def _scheme(self, module: str) -> Mapping[str, Any]:
        """The group of `config_groups` for a module: by name, by pattern, else by class."""
        groups = [g for g in (self.block.get("config_groups") or {}).values() if g]
        for group in groups:
            if any(_names(target, module) for target in group.get("targets") or ()):
                return dict(group)
        for group in groups:
            if any(str(t).isidentifier() for t in group.get("targets") or ()):
                return dict(group)
        raise CheckpointError(f"quantization_config: no config_groups has {module} as a target")

    def _weights(self, module: str) -> Mapping[str, Any]:
        return dict(self._scheme(module).get("weights") or {})

    def _block(self, module: str) -> tuple[int, int] | None:
        found = self._weights(module).get("block_structure")
        return (int(found[0]), int(found[1])) if isinstance(found, list | tuple) else None

    def _inputs(self, module: str) -> str | None:
        """How inputs are quantized, where each token has a scale of its own."""
        found = self._scheme(module).get("input_activations") or {}
        dynamic = found.get("dynamic") is True and found.get("num_bits") == 8
        if not dynamic or not found.get("symmetric", True):
            return None
        return FP8 if found.get("type") == "float" else "int8"


def _names(target: str, module: str) -> bool:
    """Whether a target is the module's name, or a pattern of its beginning."""
    if not target.startswith("re:"):
        return target == module
    try:
        return matches_whole(f"(?:{target[3:]}).*", module)
    except PatternError as problem:
        raise CheckpointError(f"quantization_config: target {target[:200]!r}: {problem}") from None
