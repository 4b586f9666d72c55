"""transposed_int8: a made-up tool's checkpoints: `qweight` int8 [inputs, outputs] and `scales`
float32 [outputs] for every quantized layer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from compress_methods.checkpoint.interchange import Layout, register_layout
from compress_methods.checkpoint.quantization_config import CompressionSpec
from compress_methods.checkpoint.safetensors import Entry
from compress_methods.errors import FormatError
from compress_methods.formats import Format, Stored, TensorSpec
from compress_methods.formats.integer import Integer, IntegerSolution

FORMAT = Integer(8, -1)
TAIL = ".qweight"


@register_layout
@dataclass(frozen=True)
class TransposedInt8(Layout):
    name: ClassVar[str] = "transposed_int8"

    def modules(self, entries: Mapping[str, Entry]) -> dict[str, tuple[int, int]]:
        found = {n.removesuffix(TAIL): e.shape for n, e in entries.items() if n.endswith(TAIL)}
        return {module: (rows, cols) for module, (cols, rows) in found.items()}

    def names(self, module: str, entries: Mapping[str, Entry]) -> list[str]:
        return [f"{module}{TAIL}", f"{module}.scales"]

    def read(self, module: str, entries: Mapping[str, Entry]) -> tuple[Format, Any]:
        weight, scales = (entries[name].read() for name in self.names(module, entries))
        codes = (weight.T.short() + 128).to(torch.uint8).contiguous()
        return FORMAT, IntegerSolution(codes, scales[:, None].bfloat16())

    def specs(self, module: str, fmt: Format, rows: int, cols: int) -> dict[str, TensorSpec]:
        if fmt != FORMAT:
            raise FormatError(f"{module}: {fmt.describe()} has no equal in {self.name}")
        weight, scales = self.names(module, {})
        return {weight: TensorSpec((cols, rows), "int8"), scales: TensorSpec((rows,), "float32")}

    def write(self, module: str, stored: Stored) -> dict[str, Tensor]:
        solution = FORMAT.solution(stored.tensors)
        weight = (solution.codes.short() - 128).to(torch.int8).T.contiguous()
        scales = solution.scales.float().flatten()
        return dict(zip(self.names(module, {}), (weight, scales), strict=True))

    def config(self, spec: CompressionSpec) -> dict[str, Any]:
        return {"quant_method": self.name}
