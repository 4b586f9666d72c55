"""reordered: a matrix stored with its columns in another order.

W[:, order] is what the format `base` stores; at run time inputs are taken in that order before the
base's own product. So columns can share a scale that are no neighbours, as GPTQ leaves them where
it orders columns by activation (`desc_act`, `actorder: group`; Frantar et al., 2022,
arXiv:2210.17323). Written by `vllm-compress import`; no algorithm of ours needs it, since ours
choose scales before they order columns.

Stored: the tensors of `base`, and

  weight_order  int32 [cols]  column i of what is stored is column order[i] of the matrix

Fails where: tensor parallelism would cut columns, whose groups lie anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from compress_methods.errors import FormatError
from compress_methods.formats.base import Format, TensorSpec, register_format
from compress_methods.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

ORDER = "weight_order"


@dataclass(frozen=True)
class ReorderedSolution:
    """Solution of the base for the columns in their order int64 [cols]."""

    base: Any
    order: Tensor


@register_format
@dataclass(frozen=True)
class Reordered(Format):
    """`base`: an `integer`, `lookup` or `float` format, for the columns as they are stored."""

    base: Format
    name: ClassVar[str] = "reordered"

    def __post_init__(self) -> None:
        if self.base.prunes or self.base.inner is not self.base or not self.base.rounds:
            raise FormatError(f"base is {self.base.name}, expected one that rounds like integer")

    def check_shape(self, rows: int, cols: int) -> None:
        self.base.check_shape(rows, cols)

    def tensors(self, rows: int, cols: int) -> dict[str, TensorSpec]:
        out = {}
        for name, spec in self.base.tensors(rows, cols).items():
            axis = spec.cols_axis
            whole = None if axis is None else replace(axis, cuts=cols)
            out[name] = replace(spec, cols_axis=whole)
        return {**out, ORDER: TensorSpec((cols,), "int32")}

    def pack(self, solution: ReorderedSolution) -> dict[str, Tensor]:
        return {**self.base.pack(solution.base), ORDER: solution.order.int().contiguous()}

    def solution(self, tensors: Mapping[str, Tensor]) -> ReorderedSolution:
        order = tensors[ORDER].long()
        if not torch.equal(order.sort().values, torch.arange(len(order), device=order.device)):
            raise FormatError(f"{ORDER} does not name every column once")
        return ReorderedSolution(self.base.solution(tensors), order)

    def matrix(self, solution: ReorderedSolution) -> Tensor:
        values = self.base.matrix(solution.base)
        return torch.empty_like(values).index_copy(1, solution.order, values)

    def nearest(
        self, weight: Tensor, importance: Tensor | None = None, mask: Tensor | None = None
    ) -> ReorderedSolution:
        """With the columns as they are."""
        order = torch.arange(weight.shape[1], device=weight.device)
        return ReorderedSolution(self.base.nearest(weight, importance, mask), order)

    @property
    def rounds(self) -> bool:
        return False

    @property
    def searches_range(self) -> bool:
        return self.base.searches_range

    def quantize_activations(self, x: Tensor) -> Tensor:
        """What the base does, whose scales are of whole tokens."""
        return self.base.quantize_activations(x)

    @property
    def cut_by(self) -> str:
        return "tensor-parallel size, or export it again without desc_act"

    def describe(self) -> str:
        return f"reordered {self.base.describe()}"
