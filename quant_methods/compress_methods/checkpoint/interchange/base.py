"""What a layout is: the names and shapes under which a checkpoint holds compressed matrices.

A format says what a matrix is stored as; a layout where in a checkpoint, under which names, packed
in which order. `read` turns a foreign checkpoint's tensors into one of our formats and a solution
of it, exactly; `write` does the reverse. With `read` alone a checkpoint can be a source of
`convert`; with `write` a result can be served without this plugin.

A new layout is one file with a class under `@register_layout`, its `name` being what config.json
calls `quant_method`; or the same in another distribution through the entry-point group
`vllm_compress.layouts`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from compress_methods.checkpoint.quantization_config import CompressionSpec
from compress_methods.checkpoint.safetensors import SLAB_BYTES, Entry
from compress_methods.errors import CheckpointError, CompressError
from compress_methods.formats import ITEMSIZE, Format, Stored, TensorSpec, torch_dtype
from compress_methods.formats.dense import Dense
from compress_methods.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Layout(ABC):
    """`block` is the checkpoint's `quantization_config`, empty where one is written."""

    block: Mapping[str, Any]
    name: ClassVar[str]

    def needed(self, module: str, leaf: str, entries: Mapping[str, Entry]) -> Entry:
        """A tensor of a module by the end of its name; `CheckpointError` where there is none."""
        name = f"{module}.{leaf}"
        if name not in entries:
            raise CheckpointError(f"{name} is missing")
        return entries[name]

    @abstractmethod
    def modules(self, entries: Mapping[str, Entry]) -> dict[str, tuple[int, int]]:
        """[rows, cols] of every compressed module among a checkpoint's tensors."""

    @abstractmethod
    def names(self, module: str, entries: Mapping[str, Entry]) -> list[str]:
        """The tensors that store a module."""

    @abstractmethod
    def read(self, module: str, entries: Mapping[str, Entry]) -> tuple[Format, Any]:
        """A module's format and its solution, exactly; `CheckpointError` where there is none."""

    def format(self, module: str, entries: Mapping[str, Entry]) -> Format | None:
        """What `read` gives the solution of, from headers and small tensors alone; None where no
        format of ours holds the module exactly, and `read` gives its values, dense."""
        fmt, _ = self.read(module, entries)
        return None if isinstance(fmt, Dense) else fmt

    def holds(self, kind: str) -> bool:
        """Whether a result in this layout can have matrices of a kind, as `Skeleton.kind` says."""
        return kind != "embedding"

    def specs(self, module: str, fmt: Format, rows: int, cols: int) -> dict[str, TensorSpec]:
        """Full names and shapes of the tensors that `write` makes; `FormatError` where a format has
        no equal in this layout."""
        raise CheckpointError(f"{self.name} checkpoints can be read, not written")

    def write(self, module: str, stored: Stored) -> dict[str, Tensor]:
        """Those tensors of a stored matrix."""
        raise NotImplementedError

    def config(self, spec: CompressionSpec) -> dict[str, Any]:
        """The `quantization_config` of a result."""
        raise NotImplementedError


LAYOUTS: Registry[type[Layout]] = Registry("layout", "vllm_compress.layouts")
register_layout = LAYOUTS.register


@dataclass(frozen=True)
class DecodedEntry(Entry):
    """A matrix that another tool quantized, as if the checkpoint held its values in bfloat16 or
    float32."""

    layout: Layout
    entries: Mapping[str, Entry]

    @property
    def module(self) -> str:
        return self.name.removesuffix(".weight")

    def of(self, dtype: str) -> DecodedEntry:
        """The same, read in another dtype."""
        size = self.shape[0] * self.shape[1] * ITEMSIZE[dtype]
        return replace(self, dtype=dtype, nbytes=size)

    def stored(self) -> tuple[Format, Any]:
        """Format and solution; `CheckpointError` where the tensors are not what they should be."""
        with _expecting(self.layout, self.module, self.path):
            return self.layout.read(self.module, self.entries)

    def format(self) -> Format | None:
        """What holds it exactly, as `Layout.format` says."""
        with _expecting(self.layout, self.module, self.path):
            return self.layout.format(self.module, self.entries)

    def values(self) -> Tensor:
        """The whole matrix, float32: no other way of reading is cheaper."""
        with _expecting(self.layout, self.module, self.path):
            fmt, solution = self.layout.read(self.module, self.entries)
            return fmt.matrix(solution)

    def read_into(self, out: Tensor, first: int = 0) -> Tensor:
        return out.copy_(self.values()[first : first + len(out)])

    def slabs(self, multiple: int = 1, limit: int = SLAB_BYTES) -> Iterator[tuple[int, Tensor]]:
        values = self.values().to(torch_dtype(self.dtype))
        step = self._slab_rows(multiple, limit)
        for first in range(0, self.rows, step):
            yield first, values[first : first + step]

    def copy_to(self, target: Tensor, check: Callable[[Tensor], Tensor] | None = None) -> None:
        for first, slab in self.slabs():
            target[first : first + len(slab)] = slab if check is None else check(slab)


@contextmanager
def _expecting(layout: Layout, module: str, path: Path) -> Iterator[None]:
    """Say in one line that a module's tensors do not fit each other."""
    try:
        yield
    except (RuntimeError, ValueError, IndexError, TypeError, KeyError, AssertionError) as problem:
        if isinstance(problem, CompressError):
            raise
        reason = next(iter(str(problem).splitlines()), type(problem).__name__)[:200]
        raise CheckpointError(
            f"{path}: the tensors of {module} are not those of {layout.name} ({reason})"
        ) from problem


def decoded_entries(block: Mapping[str, Any], entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """A quantized checkpoint's tensors with one `weight` in place of those that store it.

    `block` is its `quantization_config`. Raises `CheckpointError` where no layout knows it.
    """
    method = block.get("quant_method")
    if method not in list(LAYOUTS):
        raise CheckpointError(
            f"already quantized by {method!r}, which cannot be read exactly (only "
            f"{', '.join(sorted(LAYOUTS))}); convert the original"
        )
    layout = LAYOUTS.get(method, "quantization_config", CheckpointError)(block)
    plain = dict(entries)
    first = next(iter(entries.values()), None)
    with _expecting(layout, "the model", first.path if first else Path()):
        modules = layout.modules(entries)
    for module, shape in modules.items():
        names = layout.names(module, entries)
        for name in names:
            plain.pop(name, None)
        weight = f"{module}.weight"
        size = shape[0] * shape[1] * ITEMSIZE["float32"]
        path = entries[names[0]].path
        plain[weight] = DecodedEntry(weight, path, shape, "float32", 0, size, layout, entries)
    return plain
