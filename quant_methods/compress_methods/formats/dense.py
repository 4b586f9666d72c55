"""dense: the matrix kept as it is.

`weight_packed` [rows, cols] in the dtype it was given. Useful inside other formats (a sparse
format's kept values) and as the plainest example of a format. A module that no rule of a recipe
matches needs no format at all: it keeps its own tensors and vLLM's own layer serves it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compress_methods.errors import FormatError
from compress_methods.formats.base import Axis, Format, TensorSpec, register_format

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@register_format
@dataclass(frozen=True)
class Dense(Format):
    """Values in `dtype`: bfloat16, float16 or float32."""

    dtype: str = "bfloat16"
    name: ClassVar[str] = "dense"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise FormatError(f"dtype is {self.dtype!r}, expected one of {', '.join(DTYPES)}")

    def tensors(self, rows: int, cols: int) -> dict[str, TensorSpec]:
        return {"weight_packed": TensorSpec((rows, cols), DTYPES[self.dtype], Axis(0), Axis(1))}

    def nearest(self, weight: Tensor) -> Tensor:
        return weight

    def pack(self, solution: Tensor) -> dict[str, Tensor]:
        return {"weight_packed": solution.to(DTYPES[self.dtype]).contiguous()}

    def unpack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return tensors["weight_packed"].float()

    def describe(self) -> str:
        return self.dtype
