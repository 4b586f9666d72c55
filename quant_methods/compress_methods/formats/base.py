"""What a compressed matrix is: the one declaration everything else reads.

A `Format` is a frozen dataclass of its own parameters. It says which tensors the checkpoint holds
for a [rows, cols] matrix (`tensors`), and how values get into them (`pack`) and out (`unpack`).
The writer's shapes, tensor-parallel sharding, header validation and exact byte counts are all
derived from `tensors`; no second description exists.

A new format is one file with a class under `@register_format`, or the same in another distribution
through the entry-point group `vllm_compress.formats`.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, get_type_hints

import torch
from torch import Tensor

from compress_methods.errors import FormatError
from compress_methods.registry import Registry


@dataclass(frozen=True)
class Axis:
    """How matrix rows (or columns) lie along one axis of a stored tensor.

    `unit` consecutive rows occupy `step` consecutive entries; cuts fall on multiples of `unit`.
    """

    axis: int
    unit: int = 1
    step: int = 1

    def entries(self, count: int) -> int:
        """Length of the axis that holds `count` rows (or columns); the last unit may be partial."""
        return math.ceil(count / self.unit) * self.step


@dataclass(frozen=True)
class TensorSpec:
    """Shape, dtype and sharding of one stored tensor. A missing axis means: replicated there."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    rows_axis: Axis | None = None
    cols_axis: Axis | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Prepared:
    """Runtime form of a matrix: which kernel multiplies it, and that kernel's tensors in order."""

    kernel: str
    tensors: list[Tensor]
    rows: int
    cols: int


@dataclass(frozen=True)
class Format(ABC):
    """A way to store a [rows, cols] matrix. Subclasses add their parameters as fields."""

    name: ClassVar[str]

    @abstractmethod
    def tensors(self, rows: int, cols: int) -> dict[str, TensorSpec]:
        """What the checkpoint holds for a [rows, cols] matrix; the main one is `weight_packed`."""

    @abstractmethod
    def nearest(self, weight: Tensor) -> Any:
        """The solution closest to `weight` [rows, cols], each value chosen on its own."""

    @abstractmethod
    def pack(self, solution: Any) -> dict[str, Tensor]:
        """Stored tensors of a solution, matching `tensors` exactly."""

    @abstractmethod
    def unpack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The [rows, cols] matrix, float32: the reference every kernel is tested against."""

    def check_shape(self, rows: int, cols: int) -> None:  # noqa: B027
        """Raise `FormatError` when a [rows, cols] matrix cannot be stored."""

    def quantize_activations(self, x: Tensor) -> Tensor:
        """What the format does to its input [tokens, cols] before multiplying; nothing here."""
        return x

    def prepare(
        self, tensors: Mapping[str, Tensor], rows: int, cols: int, *, gather: bool = False
    ) -> Prepared:
        """Runtime layout of the first kernel in the table that takes this matrix on its device.

        `gather` asks for one whose rows can also be looked up one by one (embeddings).
        """
        from compress_methods import kernels

        kernel = kernels.choose(self, rows, cols, tensors["weight_packed"].device, gather=gather)
        stored = [tensors[name] for name in self.tensors(rows, cols)]
        return Prepared(kernel.name, kernel.prepare(self, stored, rows, cols), rows, cols)

    def matmul(self, x: Tensor, prepared: Prepared, bias: Tensor | None = None) -> Tensor:
        """[..., cols] -> [..., rows], in the dtype of `x`."""
        from compress_methods import kernels

        kernel = kernels.KERNELS[prepared.kernel]
        flat = x.reshape(-1, x.shape[-1])
        out = kernel.matmul(self, flat, prepared, bias)
        return out.reshape(*x.shape[:-1], prepared.rows)

    def embed(self, ids: Tensor, prepared: Prepared, dtype: torch.dtype) -> Tensor:
        """Rows `ids` [...] of the matrix -> [..., cols] in `dtype`."""
        from compress_methods import kernels

        kernel = kernels.KERNELS[prepared.kernel]
        return kernel.embed(self, ids.reshape(-1), prepared).to(dtype).reshape(*ids.shape, -1)

    def slice(
        self,
        tensors: Mapping[str, Tensor],
        shape: tuple[int, int],
        rows: tuple[int, int] | None = None,
        cols: tuple[int, int] | None = None,
    ) -> dict[str, Tensor]:
        """Views of the stored tensors that hold only rows [start, end) and columns [start, end)."""
        out = {}
        for name, spec in self.tensors(*shape).items():
            tensor = tensors[name]
            for axis, cut, size in (
                (spec.rows_axis, rows, shape[0]),
                (spec.cols_axis, cols, shape[1]),
            ):
                if axis is not None and cut is not None:
                    tensor = _narrow(tensor, axis, cut, size, f"{self.name} {name}")
            out[name] = tensor
        return out

    def units(self, rows: int, cols: int) -> tuple[int, int]:
        """Smallest (rows, columns) a [rows, cols] matrix can be cut at."""
        specs = self.tensors(rows, cols).values()
        row_units = [s.rows_axis.unit for s in specs if s.rows_axis]
        col_units = [s.cols_axis.unit for s in specs if s.cols_axis]
        return math.lcm(1, *row_units), math.lcm(1, *col_units)

    def nbytes(self, rows: int, cols: int) -> int:
        """Exact stored bytes of a [rows, cols] matrix."""
        return sum(spec.nbytes for spec in self.tensors(rows, cols).values())

    def to_dict(self) -> dict[str, Any]:
        """The JSON form in `quantization_config`; `format_from_dict` reads it back."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        nested = {k: v.to_dict() if isinstance(v, Format) else v for k, v in fields.items()}
        return {"format": self.name, **nested}

    @property
    def sparsity(self) -> float:
        """Share of the matrix that is zero because nothing is stored for it."""
        return 0.0

    def describe(self) -> str:
        """A few words for tables, such as `int4 g128`."""
        return self.name


def _narrow(tensor: Tensor, axis: Axis, cut: tuple[int, int], size: int, what: str) -> Tensor:
    start, end = cut
    if start % axis.unit or (end % axis.unit and end != size):
        raise FormatError(
            f"{what}: cannot cut at [{start}, {end}) of {size}; cuts fall on multiples of "
            f"{axis.unit}"
        )
    first = start // axis.unit * axis.step
    return tensor.narrow(axis.axis, first, axis.entries(end - start))


FORMATS: Registry[type[Format]] = Registry("format", "vllm_compress.formats")
register_format = FORMATS.register


def format_from_dict(spec: Mapping[str, Any], where: str = "format") -> Format:
    """Build a format from its JSON form, formats inside it likewise; unknown names and keys are
    errors naming the nearest."""
    values = spec
    if isinstance(spec, Mapping) and "format" in spec:
        hints = get_type_hints(FORMATS.get(spec["format"], where, FormatError))
        values = {
            key: format_from_dict(value, f"{where}.{key}") if hints.get(key) is Format else value
            for key, value in spec.items()
        }
    return FORMATS.build(values, "format", where, FormatError)
