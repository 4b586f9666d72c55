"""lookup2: four values per row and 2-bit codes, filled by any shipped algorithm."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from compress_methods.formats import MAIN_TENSOR, Axis, Format, TensorSpec, register_format
from compress_methods.formats.encoding.codes import pack_codes, unpack_codes

BLOCK = 32
QUANTILES = (0.05, 0.32, 0.68, 0.95)


class Table:
    """The four values of each row [rows, 4]."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def pick(self, column: int | Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        codes = (weights[:, None] - self.values).abs().argmin(1)
        return codes.to(torch.uint8), self.values.gather(1, codes[:, None])[:, 0]

    def solution(self, codes: Tensor) -> Any:
        return codes, self.values


@register_format
@dataclass(frozen=True)
class Lookup2(Format):
    """Values at four quantiles of each row."""

    name: ClassVar[str] = "lookup2"

    def tensors(self, rows: int, cols: int) -> dict[str, TensorSpec]:
        codes = TensorSpec((rows, cols // 4), "uint8", Axis(0), Axis(1, BLOCK, BLOCK // 4))
        return {MAIN_TENSOR: codes, "weight_table": TensorSpec((rows, 4), "float32", Axis(0))}

    def grid(self, weight: Tensor, importance: Tensor | None = None) -> Table:
        return Table(weight.quantile(weight.new_tensor(QUANTILES), dim=1).T.contiguous())

    def pack(self, solution: Any) -> dict[str, Tensor]:
        codes, values = solution
        return {MAIN_TENSOR: pack_codes(codes, 2, BLOCK), "weight_table": values}

    def solution(self, tensors: Mapping[str, Tensor]) -> Any:
        return unpack_codes(tensors[MAIN_TENSOR], 2, BLOCK), tensors["weight_table"]

    def matrix(self, solution: Any) -> Tensor:
        codes, values = solution
        return values.gather(1, codes.long())
