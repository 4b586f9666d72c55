"""dense: the matrix kept as it is.

`weight_packed` [rows, cols] in the dtype it was given. Useful inside other formats (a sparse
format's kept values) and as the plainest example of a format. A module that no rule of a recipe
matches needs no format at all: it keeps its own tensors and vLLM's own layer serves it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar

from compress_methods.errors import FormatError
from compress_methods.formats.base import (
    MAIN_TENSOR,
    Axis,
    Format,
    TensorSpec,
    register_format,
    torch_dtype,
)
from compress_methods.formats.relaxed import Relaxed, stored_as
from compress_methods.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

TINY = 1e-30
DTYPES = ("bfloat16", "float16", "float32")


class Exact:
    """A grid that holds every value."""

    def pick(self, column: int | Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        return weights, weights

    def solution(self, codes: Tensor) -> Tensor:
        return codes


@register_format
@dataclass(frozen=True)
class Dense(Format):
    """Values in `dtype`: bfloat16, float16 or float32."""

    dtype: str = "bfloat16"
    name: ClassVar[str] = "dense"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise FormatError(f"dtype is {self.dtype!r}, expected one of {', '.join(DTYPES)}")

    @property
    def rounds(self) -> bool:
        return False

    def tensors(self, rows: int, cols: int) -> dict[str, TensorSpec]:
        return {MAIN_TENSOR: TensorSpec((rows, cols), self.dtype, Axis(0), Axis(1))}

    def grid(self, weight: Tensor, importance: Tensor | None = None) -> Exact:
        return Exact()

    def nearest(
        self, weight: Tensor, importance: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        return weight

    def pack(self, solution: Tensor) -> dict[str, Tensor]:
        values = solution.to(torch_dtype(self.dtype)).contiguous()
        if not values.isfinite().all():
            raise FormatError(f"a value does not fit {self.dtype}; use dtype: bfloat16")
        return {MAIN_TENSOR: values}

    def solution(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return tensors[MAIN_TENSOR]

    def matrix(self, solution: Tensor) -> Tensor:
        return solution.float()

    def relax(self, solution: Tensor, weight: Tensor) -> RelaxedDense:
        return RelaxedDense(self, solution)

    def describe(self) -> str:
        return self.dtype


class RelaxedDense(Relaxed):
    """How far each value has moved, 1 being the mean size of its row's values."""

    rates = MappingProxyType({"moves": 0.5})

    def __init__(self, fmt: Dense, solution: Tensor) -> None:
        self.fmt, self._start = fmt, solution.to(torch.float32, copy=True)
        self._unit = self._start.abs().mean(1, keepdim=True).clamp_(min=TINY)
        self.parameters = {"moves": torch.zeros_like(self._start)}

    def matrix(self, parameters: Mapping[str, Tensor]) -> Tensor:
        values = self._start + self._unit * parameters["moves"]
        return stored_as(values, torch_dtype(self.fmt.dtype))

    def move(self, steps: Mapping[str, Tensor]) -> None:
        self.parameters["moves"].sub_(steps["moves"])

    def solution(self) -> Tensor:
        return self.matrix(self.parameters)
