"""lowrank: A B added to any other format, or alone.

W = Q + A B with A [rows, rank] and B [rank, cols]: Q is what the format `base` stores, A B the part
of what it lost that costs the outputs most (LQER, Zhang et al., 2024, arXiv:2402.02446; QERA, Zhang
et al., 2025, arXiv:2410.06040; EoRA, Liu et al., 2024, arXiv:2410.21271). Without a base A B is all
there is (SVD-LLM, Wang et al., 2024, arXiv:2403.07378). Algorithm `svd` chooses both.

Stored, for a [rows, cols] matrix:

  weight_left*   A as the format `factors` stores a [rows, rank] matrix; alone under its own names
  weight_right*  B as it stores a [rank, cols] matrix
  and the tensors of `base`

`*` is what follows `weight_packed`: nothing, or `_scales` as in `weight_left_scales`. Where rows
are cut for tensor parallelism A is and B is in every piece; where columns are, the other way round.

A first is rounded, then B is refitted to what A has become, then rounded. Costs 16 r (1/rows +
1/cols) bits a weight in bfloat16. Fails where: `factors` are integers and the rank is no multiple
of 32; a base that has no rows or columns to cut (codebooks for all of a matrix); alone, a matrix of
a language model loses more than an integer format of the same bytes does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from compress_methods.errors import FormatError
from compress_methods.formats.base import MAIN_TENSOR, Format, TensorSpec, register_format
from compress_methods.formats.dense import Dense
from compress_methods.formats.fitting.principal import principal
from compress_methods.formats.integer import Integer
from compress_methods.formats.stored import Stored
from compress_methods.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

LEFT, RIGHT = "weight_left", "weight_right"
SLAB_ELEMENTS = 2**22
STEM = MAIN_TENSOR.removesuffix("_packed")


@dataclass(frozen=True)
class LowRankSolution:
    """Solutions: of the base (None without one), of A [rows, rank] and of B [rank, cols]."""

    base: Any
    left: Any
    right: Any


@register_format
@dataclass(frozen=True)
class LowRank(Format):
    """`rank` columns of A; `base`: the format that the rest is stored in; `factors`: that of A and
    B, dense or integer."""

    rank: int
    base: Format | None = None
    factors: Format = Dense()  # noqa: RUF009  (frozen)
    name: ClassVar[str] = "lowrank"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise FormatError(f"rank is {self.rank}, expected at least 1")
        if isinstance(self.base, LowRank | Dense):
            raise FormatError(f"base is {self.base.name}, expected a format that loses something")
        plain = isinstance(self.factors, Integer) and self.factors.activations is None
        if not (plain or isinstance(self.factors, Dense)):
            raise FormatError(
                f"factors is {self.factors.describe()}, expected dense or integer, without "
                "activations"
            )
        try:
            self.factors.check_shape(1, self.rank)
        except FormatError as problem:
            raise FormatError(f"factors of rank {self.rank}: {problem}") from None

    def check_shape(self, rows: int, cols: int) -> None:
        if self.rank > min(rows, cols):
            raise FormatError(f"rank {self.rank} of a matrix of {rows} rows and {cols} columns")
        if self.base is not None:
            self.base.check_shape(rows, cols)
        self.factors.check_shape(self.rank, cols)

    def tensors(self, rows: int, cols: int) -> dict[str, TensorSpec]:
        out = {}
        if self.base is not None:
            out = self.base.tensors(rows, cols)
            axes = [(spec.rows_axis, spec.cols_axis) for spec in out.values()]
            if not all(map(any, zip(*axes, strict=True))):
                raise FormatError(f"base is {self.base.name}, whose tensors cannot be cut as A, B")
        for name, spec in self.factors.tensors(rows, self.rank).items():
            out[self._outer(LEFT, name)] = replace(spec, cols_axis=None)
        for name, spec in self.factors.tensors(self.rank, cols).items():
            out[self._outer(RIGHT, name)] = replace(spec, rows_axis=None)
        return out

    def _outer(self, side: str, name: str) -> str:
        """What a tensor of a factor is called here."""
        if side == LEFT and self.base is None:
            return name
        return side + name.removeprefix(MAIN_TENSOR).removeprefix(STEM)

    def _inner(self, side: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a factor under the names its format gives them."""
        names = self.factors.tensors(self.rank, self.rank)
        return {name: tensors[self._outer(side, name)] for name in names}

    def left(self, stored: Stored) -> Stored:
        """The rows of A that a stored piece of the matrix has."""
        shape, cols = (stored.shape[0], self.rank), (0, self.rank)
        return Stored(self.factors, self._inner(LEFT, stored.tensors), shape, stored.rows, cols)

    def right(self, stored: Stored) -> Stored:
        """The columns of B that a stored piece of the matrix has."""
        shape, rows = (self.rank, stored.shape[1]), (0, self.rank)
        return Stored(self.factors, self._inner(RIGHT, stored.tensors), shape, rows, stored.cols)

    def pack(self, solution: LowRankSolution) -> dict[str, Tensor]:
        out = {} if self.base is None else self.base.pack(solution.base)
        for side, factor in ((LEFT, solution.left), (RIGHT, solution.right)):
            packed = self.factors.pack(factor)
            out |= {self._outer(side, name): tensor for name, tensor in packed.items()}
        return out

    def solution(self, tensors: Mapping[str, Tensor]) -> LowRankSolution:
        base = None if self.base is None else self.base.solution(tensors)
        left, right = (self.factors.solution(self._inner(s, tensors)) for s in (LEFT, RIGHT))
        return LowRankSolution(base, left, right)

    def matrix(self, solution: LowRankSolution) -> Tensor:
        found = self.product(solution)
        return found if self.base is None else found + self.base.matrix(solution.base)

    def product(self, solution: LowRankSolution) -> Tensor:
        """A B [rows, cols] float32. Summed in float64, where products of few bits are exact: a
        piece has the bits that the whole has there."""
        left, right = map(self.factors.matrix, (solution.left, solution.right))
        slabs = left.split(max(1, SLAB_ELEMENTS // right.shape[1]))
        return torch.cat([(slab.double() @ right.double()).float() for slab in slabs])

    def correct(self, base: Any, error: Tensor, hessian: Tensor | None = None) -> LowRankSolution:
        """The solution with that of `base` and the A B closest to `error` [rows, cols], which it
        leaves; by `hessian` as `principal` takes it."""
        left = self.factors.nearest(principal(error, self.rank, hessian))
        right = torch.linalg.pinv(self.factors.matrix(left)) @ error
        return LowRankSolution(base, left, self.factors.nearest(right))

    def nearest(
        self, weight: Tensor, importance: Tensor | None = None, mask: Tensor | None = None
    ) -> LowRankSolution:
        """The base's nearest, then the A B nearest to what that leaves."""
        base, error = None, weight
        if self.base is not None:
            base = self.base.nearest(weight, importance, mask)
            error = weight - self.base.matrix(base)
        if importance is not None and importance.dim() > 1:
            importance = importance.mean(0)
        return self.correct(base, error, importance)

    @property
    def searches_range(self) -> bool:
        return self.base is not None and self.base.searches_range

    @property
    def holds_zero(self) -> bool:
        return False

    def quantize_activations(self, x: Tensor) -> Tensor:
        return x if self.base is None else self.base.quantize_activations(x)

    @property
    def cut_by(self) -> str:
        return (self.factors if self.base is None else self.base).cut_by

    def describe(self) -> str:
        factors = "" if self.factors == Dense() else f" {self.factors.describe()}"
        own = f"rank {self.rank}{factors}"
        return own if self.base is None else f"{self.base.describe()} + {own}"
