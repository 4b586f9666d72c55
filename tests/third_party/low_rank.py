"""low_rank: any base format plus A B, the best rank-r correction of what the base lost."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from compress_methods.algorithms import register_algorithm
from compress_methods.algorithms.gptq import GPTQ
from compress_methods.formats import Axis, Format, Stored, TensorSpec, register_format
from compress_methods.kernels import Kernel, Prepared, Want, matmul, prepare, register_kernel


@register_format
@dataclass(frozen=True)
class LowRank(Format):
    base: Format
    rank: int = 4
    name: ClassVar[str] = "low_rank"

    def tensors(self, rows: int, cols: int) -> dict[str, TensorSpec]:
        left = TensorSpec((rows, self.rank), "float32", Axis(0))
        right = TensorSpec((self.rank, cols), "float32", None, Axis(1))
        return {**self.base.tensors(rows, cols), "weight_left": left, "weight_right": right}

    def pack(self, solution: Any) -> dict[str, Tensor]:
        base, left, right = solution
        return {**self.base.pack(base), "weight_left": left, "weight_right": right}

    def solution(self, tensors: Mapping[str, Tensor]) -> Any:
        return self.base.solution(tensors), tensors["weight_left"], tensors["weight_right"]

    def matrix(self, solution: Any) -> Tensor:
        return self.base.matrix(solution[0]) + solution[1] @ solution[2]


@register_algorithm
@dataclass(frozen=True)
class Corrected(GPTQ):
    name: ClassVar[str] = "corrected_gptq"
    row_independent: ClassVar[bool] = False

    def check_format(self, fmt: Format) -> None:
        super().check_format(fmt.base)

    def solve(self, weight: Tensor, prepared: Any, fmt: Format) -> Any:
        base = super().solve(weight, prepared, fmt.base)
        u, s, v = torch.linalg.svd(weight - fmt.base.matrix(base), full_matrices=False)
        return base, (u * s)[:, : fmt.rank].contiguous(), v[: fmt.rank].contiguous()


@register_kernel
class LowRankKernel(Kernel):
    name: ClassVar[str] = "low_rank"

    def rank(self, stored: Stored, want: Want) -> int | None:
        return 150 if isinstance(stored.format, LowRank) and not want.embed else None

    def prepare(self, stored: Stored, want: Want) -> Prepared:
        base = prepare(stored.nested(stored.format.base), replace(want, host=None, pad=0))
        tensors = [stored.tensors[name].clone() for name in ("weight_left", "weight_right")]
        return Prepared(self.name, *stored.size, tensors, stored.format, parts=(base,))

    def matmul(self, x: Tensor, prepared: Prepared, bias: Tensor | None) -> Tensor:
        left, right = prepared.tensors
        return matmul(x, prepared.parts[0], bias) + (x.float() @ right.T @ left.T).to(x.dtype)
