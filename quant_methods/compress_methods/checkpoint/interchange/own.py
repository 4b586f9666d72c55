"""Our own layout: the tensors a format declares, each under its module's name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from compress_methods.checkpoint.compressed import matrix_of
from compress_methods.checkpoint.interchange.base import Layout, register_layout
from compress_methods.checkpoint.quantization_config import QUANT_METHOD, CompressionSpec, parse
from compress_methods.checkpoint.safetensors import Entry
from compress_methods.errors import CheckpointError
from compress_methods.formats import MAIN_TENSOR, Format, Stored, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor


@register_layout
@dataclass(frozen=True)
class OwnLayout(Layout):
    """Reads and writes what `vllm_compress` serves."""

    name: ClassVar[str] = QUANT_METHOD

    @cached_property
    def spec(self) -> CompressionSpec:
        return parse(self.block)

    def modules(self, entries: Mapping[str, Entry]) -> dict[str, tuple[int, int]]:
        tail = f".{MAIN_TENSOR}"
        named = [name.removesuffix(tail) for name in entries if name.endswith(tail)]
        # A head tied to the embedding has no parameter of its own; layers that share weights do.
        tied = self.spec.tied.items()
        named += [alias for alias, owner in tied if owner in named and owner != self.spec.embedding]
        owners = {module: self.spec.tied.get(module, module) for module in named}
        held = {owner: matrix_of(owner, self.spec, entries) for owner in owners.values()}
        return {module: (held[o].rows, held[o].cols) for module, o in owners.items()}

    def names(self, module: str, entries: Mapping[str, Entry]) -> list[str]:
        fmt, shape = self._stored_as(module)
        return list(self.specs(self.spec.tied.get(module, module), fmt, *shape))

    def read(self, module: str, entries: Mapping[str, Entry]) -> tuple[Format, Any]:
        fmt, shape = self._stored_as(module)
        owner = self.spec.tied.get(module, module)
        tensors = {name: entries[f"{owner}.{name}"].read() for name in fmt.tensors(*shape)}
        return fmt, fmt.solution(tensors)

    def specs(self, module: str, fmt: Format, rows: int, cols: int) -> dict[str, TensorSpec]:
        return {f"{module}.{name}": spec for name, spec in fmt.tensors(rows, cols).items()}

    def write(self, module: str, stored: Stored) -> dict[str, Tensor]:
        return {f"{module}.{name}": tensor for name, tensor in stored.tensors.items()}

    def config(self, spec: CompressionSpec) -> dict[str, Any]:
        return spec.to_dict()

    def _stored_as(self, module: str) -> tuple[Format, tuple[int, int]]:
        rule = self.spec.rule_for(module)
        if rule is None or rule.shape is None:
            raise CheckpointError(f"{module}.{MAIN_TENSOR}: no rule with a shape for it")
        return self.spec.formats[rule.format], rule.shape


OWN = OwnLayout({})
