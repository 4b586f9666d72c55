"""What a compressed matrix is: the one declaration everything else reads.

A `Format` is a frozen dataclass of its own parameters. It says which tensors the checkpoint holds
for a [rows, cols] matrix (`tensors`), how values get into them (`pack`) and out (`unpack`), and
which values a weight can become (`grid`, `rounder`). The writer's shapes, tensor-parallel sharding,
header validation and exact byte counts are all derived from `tensors`; no second description
exists. How a matrix is multiplied is not a format's business: see `kernels`.

A new format is one file with a class under `@register_format`, or the same in another distribution
through the entry-point group `vllm_compress.formats`. Formats compose by nesting: a field of type
`Format`, or `Format | None`, holds another one. Importing formats needs no torch; dtypes are names.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, get_type_hints

from compress_methods.errors import FormatError
from compress_methods.formats.fitting.least_squares import Unscaled, refit_scales
from compress_methods.formats.relaxed import Relaxed
from compress_methods.formats.rounder import ColumnRounder, Grid, Rounder
from compress_methods.lazy import torch
from compress_methods.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

MAIN_TENSOR = "weight_packed"
"""The tensor that every compressed matrix has; LoRA in vLLM looks for this name."""

ITEMSIZE = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}
"""Bytes of one value, by the name torch gives the dtype."""


def count_not_finite(values: Tensor) -> int:
    """How many values are NaN or infinite."""
    if not values.is_floating_point():
        return 0
    # torch says it of no float8.
    finite = (values.float() if values.dtype.itemsize == 1 else values).isfinite()
    return 0 if bool(finite.all()) else int((~finite).sum())


def torch_dtype(name: str) -> torch.dtype:
    """torch's dtype of a name in `ITEMSIZE`."""
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """Inverse of `torch_dtype`."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Axis:
    """How matrix rows (or columns) lie along one axis of a stored tensor.

    `unit` consecutive rows occupy `step` consecutive entries. Cuts fall on multiples of `every`
    rows: `cuts`, a multiple of `unit`, or `unit` itself.
    """

    axis: int
    unit: int = 1
    step: int = 1
    cuts: int | None = None

    @property
    def every(self) -> int:
        """Rows (or columns) between the places at which the axis can be cut."""
        return self.cuts or self.unit

    def entries(self, count: int) -> int:
        """Length of the axis that holds `count` rows (or columns); the last unit may be partial."""
        return math.ceil(count / self.unit) * self.step


@dataclass(frozen=True)
class TensorSpec:
    """Shape, dtype (a name in `ITEMSIZE`) and sharding of one stored tensor. A missing axis means:
    replicated there, whatever is cut."""

    shape: tuple[int, ...]
    dtype: str
    rows_axis: Axis | None = None
    cols_axis: Axis | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZE[self.dtype]

    def empty(self) -> Tensor:
        """A tensor of that shape and dtype, not filled."""
        return torch.empty(self.shape, dtype=torch_dtype(self.dtype))


@dataclass(frozen=True)
class Format(ABC):
    """A way to store a [rows, cols] matrix. Subclasses add their parameters as fields.

    A *solution* is what an algorithm chooses and `pack` stores, such as codes and scales; its type
    is the format's own.
    """

    name: ClassVar[str]

    @abstractmethod
    def tensors(self, rows: int, cols: int) -> dict[str, TensorSpec]:
        """What the checkpoint holds for a [rows, cols] matrix; the main one is `weight_packed`."""

    @abstractmethod
    def pack(self, solution: Any) -> dict[str, Tensor]:
        """Stored tensors of a solution, matching `tensors` exactly."""

    @abstractmethod
    def solution(self, tensors: Mapping[str, Tensor]) -> Any:
        """Inverse of `pack`."""

    @abstractmethod
    def matrix(self, solution: Any) -> Tensor:
        """The [rows, cols] values of a solution, float32: the truth kernels are tested against.

        Differentiable in whatever of the solution is continuous, such as scales.
        """

    def unpack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The [rows, cols] matrix, float32, of stored tensors."""
        return self.matrix(self.solution(tensors))

    def grid(self, weight: Tensor, importance: Tensor | None = None) -> Grid:
        """The values that the columns of `weight` [rows, cols] can take, fitted to them.

        With `importance` [cols] or [rows, cols] the fit is the one of least squared error weighted
        by it, where `searches_range` says so; without, no value is clipped.
        """
        raise FormatError(f"{self.name} cannot be rounded column by column")

    def rounder(
        self, weight: Tensor, importance: Tensor | None = None, mask: Tensor | None = None
    ) -> Rounder:
        """What an error-feedback pass asks for the values of every column.

        `weight` [rows, cols] is what the grid is fitted to. `mask` bool [rows, cols] says which
        places of a format that `prunes` are kept; without one the rounder chooses on its way.
        """
        return ColumnRounder(self.grid(weight, importance), weight.shape)

    def nearest(
        self, weight: Tensor, importance: Tensor | None = None, mask: Tensor | None = None
    ) -> Any:
        """The solution closest to `weight` [rows, cols], each value chosen on its own; `importance`
        and `mask` as `rounder` takes them."""
        rounder = self.rounder(weight, importance, mask)
        for column, values in enumerate(weight.T):
            rounder.pick(column, values)
        return rounder.solution()

    def grid_of(self, solution: Any) -> Grid | None:
        """The values that the columns of a solution could take besides those they have; None where
        a solution cannot be revised."""
        return None

    def revisor(self, solution: Any, shape: tuple[int, ...]) -> Rounder | None:
        """A rounder over `grid_of` a solution [rows, cols], which picks every column anew."""
        grid = self.grid_of(solution)
        return None if grid is None else ColumnRounder(grid, shape)

    def unscaled(self, solution: Any) -> Unscaled | None:
        """What the scales of a solution multiply; None where it has none."""
        return None

    def rescaled(self, solution: Any, scales: Tensor) -> Any:
        """A solution with other scales for those of `unscaled`."""
        raise FormatError(f"{self.name} has no scales")

    def refit(self, solution: Any, weight: Tensor, hessian: Tensor) -> Any:
        """The solution whose scales bring it closest to `weight` [rows, cols], by `hessian`."""
        found = self.unscaled(solution)
        if found is None:
            return solution
        return self.rescaled(solution, refit_scales(found, weight, hessian))

    def relax(self, solution: Any, weight: Tensor) -> Relaxed:
        """The solution as something that gradients can move, see `relaxed.py`. `weight`
        [rows, cols] float32 is what it stands for: how near each value was to another choice."""
        raise FormatError(f"{self.name} has nothing that gradients can move")

    @property
    def relaxes(self) -> bool:
        """Whether `relax` can be called."""
        return type(self).relax is not Format.relax

    @property
    def rounds(self) -> bool:
        """Whether stored values differ from those given, and a pass can choose among them."""
        own = type(self)
        return own.grid is not Format.grid or own.rounder is not Format.rounder

    @property
    def searches_range(self) -> bool:
        """Whether `importance` changes what `nearest` and `grid` choose."""
        return False

    @property
    def learns_values(self) -> bool:
        """Whether the values that codes stand for are fitted to the weights, not only scaled."""
        return False

    @property
    def holds_zero(self) -> bool:
        """Whether 0 is among the values."""
        return True

    @property
    def span(self) -> int:
        """Neighbouring columns that are decided together."""
        return 1

    @property
    def prunes(self) -> bool:
        """Whether some places of a matrix are not stored, chosen by `select`."""
        return False

    def select(self, scores: Tensor) -> Tensor:
        """bool like `scores` [rows, cols]: the places kept if the highest scores are to be."""
        return torch.ones_like(scores, dtype=torch.bool)

    def unrounded(self) -> Format:
        """The format that keeps the same places, their values in float32 as they are."""
        plain: Format = format_from_dict({"format": "dense", "dtype": "float32"})
        return plain

    @property
    def inner(self) -> Format:
        """The format that algorithms fill and kernels multiply with: this one, or the one inside a
        wrapper that stores the matrix in another basis. Its solutions are this one's too."""
        return self

    def turn(self, weight: Tensor) -> Tensor:
        """`weight` [rows, cols] in the basis of `inner`: whole, or rows cut at `alignment`."""
        return weight

    def turn_back(self, weight: Tensor) -> Tensor:
        """Inverse of `turn`."""
        return weight

    def turn_inputs(self, x: Tensor) -> Tensor:
        """Inputs [..., cols] in that basis, an orthogonal one: `turn(weight) @ turn_inputs(x)` has
        the length of `weight @ x`."""
        return x

    def check_shape(self, rows: int, cols: int) -> None:  # noqa: B027
        """Raise `FormatError` when a [rows, cols] matrix cannot be stored."""

    def quantize_activations(self, x: Tensor) -> Tensor:
        """What the format does to its input [tokens, cols] before multiplying; nothing here."""
        return x

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
                    tensor = narrow(tensor, axis, cut, size, f"{self.name} {name}")
            out[name] = tensor
        return out

    def alignment(self, rows: int, cols: int) -> tuple[int, int]:
        """Smallest (rows, columns) a [rows, cols] matrix can be cut at."""
        specs = self.tensors(rows, cols).values()
        row_units = [s.rows_axis.every for s in specs if s.rows_axis]
        col_units = [s.cols_axis.every for s in specs if s.cols_axis]
        return math.lcm(1, *row_units), math.lcm(1, *col_units)

    @property
    def cut_by(self) -> str:
        """The parameters that decide where a matrix can be cut, for error messages."""
        return "group_size or m"

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


def narrow(tensor: Tensor, axis: Axis, cut: tuple[int, int], size: int, what: str) -> Tensor:
    """The entries of `tensor` that hold [start, end) of `size` rows (or columns), as a view."""
    start, end = cut
    if start % axis.every or (end % axis.every and end != size):
        raise FormatError(
            f"{what}: cannot cut at [{start}, {end}) of {size}; cuts fall on multiples of "
            f"{axis.every}"
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
        nested = {key for key, hint in hints.items() if hint in (Format, Format | None)}
        values = {
            key: value
            if value is None or key not in nested
            else format_from_dict(value, f"{where}.{key}")
            for key, value in spec.items()
        }
    return FORMATS.build(values, "format", where, FormatError)
