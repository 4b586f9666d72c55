"""repack: the numbers that another tool chose, as they are.

For sources that are quantized already: what a matrix is stored as there is what it is stored as
here, in a format that holds the same numbers exactly. Nothing is rounded; a matrix that the format
does not hold exactly is refused, as is one that a transform has changed. Needs no text.
`vllm-compress import` writes a recipe of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from compress_methods.algorithms.base import Algorithm, register_algorithm
from compress_methods.errors import RecipeError
from compress_methods.formats import Format

if TYPE_CHECKING:
    from torch import Tensor


@register_algorithm
@dataclass(frozen=True)
class Repack(Algorithm):
    """No parameters; done by `conversion/passes/repacking.py`, which knows the source."""

    name: ClassVar[str] = "repack"
    copies: ClassVar[bool] = True

    def solve(self, weight: Tensor, prepared: Any, fmt: Format) -> Any:
        raise RecipeError(f"{self.name}: takes what a source stores, not values")
