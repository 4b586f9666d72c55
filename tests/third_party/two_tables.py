"""two_tables: a token's vector is the sum of two, of its number's quotient and its remainder by 32.

Both tables are needed for every row, so no tensor is cut when the rows are: each rank holds them
whole and knows which rows are its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from compress_methods.errors import FormatError
from compress_methods.formats import MAIN_TENSOR, Format, TensorSpec, register_format

STEP = 32


@register_format
@dataclass(frozen=True)
class TwoTables(Format):
    """For vocabularies of a multiple of 32 tokens."""

    name: ClassVar[str] = "two_tables"

    def check_shape(self, rows: int, cols: int) -> None:
        if rows % STEP:
            raise FormatError(f"{rows} rows are no multiple of {STEP}")

    def tensors(self, rows: int, cols: int) -> dict[str, TensorSpec]:
        return {
            MAIN_TENSOR: TensorSpec((rows // STEP, cols), "float32"),
            "weight_remainder": TensorSpec((STEP, cols), "float32"),
        }

    def nearest(
        self, weight: Tensor, importance: Tensor | None = None, mask: Tensor | None = None
    ) -> Any:
        grouped = weight.unflatten(0, (-1, STEP))
        quotient = grouped.mean(1)
        return quotient, (grouped - quotient[:, None]).mean(0)

    def pack(self, solution: Any) -> dict[str, Tensor]:
        return {MAIN_TENSOR: solution[0].contiguous(), "weight_remainder": solution[1].contiguous()}

    def solution(self, tensors: Mapping[str, Tensor]) -> Any:
        return tensors[MAIN_TENSOR], tensors["weight_remainder"]

    def matrix(self, solution: Any) -> Tensor:
        return (solution[0][:, None] + solution[1]).flatten(0, 1)
