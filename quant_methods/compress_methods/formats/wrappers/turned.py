"""What formats share that store a matrix in another basis, or with columns added.

Tensors, solutions and choices are those of the base, see `Format.inner`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from compress_methods.formats.base import Format

if TYPE_CHECKING:
    from torch import Tensor


class Turned(Format):
    """A subclass says how a weight turns into what `base` stores, and back."""

    base: Format

    def pack(self, solution: Any) -> dict[str, Tensor]:
        return self.base.pack(solution)

    def solution(self, tensors: Mapping[str, Tensor]) -> Any:
        return self.base.solution(tensors)

    def matrix(self, solution: Any) -> Tensor:
        return self.turn_back(self.base.matrix(solution))

    @property
    def inner(self) -> Format:
        return self.base

    @property
    def rounds(self) -> bool:
        return self.base.rounds

    @property
    def searches_range(self) -> bool:
        return self.base.searches_range

    @property
    def learns_values(self) -> bool:
        return self.base.learns_values

    @property
    def holds_zero(self) -> bool:
        return self.base.holds_zero
