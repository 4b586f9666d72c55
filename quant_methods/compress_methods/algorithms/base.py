"""What an algorithm is: gather, prepare, solve.

`needs` names what the pipeline gathers from calibration; `prepare` turns that into whatever all
matrices reading the same input can share (q, k and v share one Hessian); `solve` chooses the values
of one matrix. An algorithm is a frozen dataclass whose fields are its parameters in a recipe.

A new algorithm is one file with a class under `@register_algorithm`, or the same in another
distribution through the entry-point group `vllm_compress.algorithms`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from compress_methods.errors import RecipeError
from compress_methods.formats.base import Format
from compress_methods.registry import Registry

Needs = Literal["nothing", "input_norms", "hessian"]


class InputNorms:
    """Sum of squares of each input column over all calibration tokens: [cols] float32."""

    def __init__(self, cols: int, device: torch.device) -> None:
        self.squares = torch.zeros(cols, device=device)
        self.tokens = 0

    def add_batch(self, x: Tensor) -> None:
        """x [..., cols]: the layer's input."""
        x = x.reshape(-1, x.shape[-1]).float()
        self.squares += x.square().sum(0)
        self.tokens += len(x)


class Hessian:
    """Mean of x x^T over all calibration tokens: [cols, cols] float32, half the second derivative
    of the layer's mean squared output error by any row of its weight."""

    def __init__(self, cols: int, device: torch.device) -> None:
        self._sum = torch.zeros(cols, cols, device=device)
        self._divided = False
        self.tokens = 0

    def add_batch(self, x: Tensor) -> None:
        """x [..., cols]: the layer's input."""
        x = x.reshape(-1, x.shape[-1]).float()
        self._sum.addmm_(x.T, x)
        self.tokens += len(x)

    def mean(self) -> Tensor:
        """The matrix; gathering ends with the first call (the sum is divided in place)."""
        if not self._divided:
            self._sum /= max(1, self.tokens)
            self._divided = True
        return self._sum


GATHERERS: dict[Needs, type[InputNorms] | type[Hessian]] = {
    "input_norms": InputNorms,
    "hessian": Hessian,
}
Gathered = InputNorms | Hessian | None


@dataclass(frozen=True)
class Algorithm(ABC):
    """A way to choose the stored values of a matrix."""

    name: ClassVar[str]
    needs: ClassVar[Needs] = "nothing"
    row_independent: ClassVar[bool] = True
    """Whether rows of a matrix may be solved in several calls (large ones are, to save memory)."""

    def check_format(self, fmt: Format) -> None:  # noqa: B027
        """Raise `RecipeError` when this algorithm cannot fill that format."""

    def prepare(self, gathered: Gathered, fmt: Format) -> Any:
        """Work that all matrices of one format with the same input share."""
        return gathered

    @abstractmethod
    def solve(self, weight: Tensor, prepared: Any, fmt: Format) -> Any:
        """Solution of `fmt` for `weight` [rows, cols] float32."""


ALGORITHMS: Registry[type[Algorithm]] = Registry("algorithm", "vllm_compress.algorithms")
register_algorithm = ALGORITHMS.register


def require(condition: bool, algorithm: str, fmt: Format, expected: str) -> None:
    """`RecipeError` naming algorithm and format unless `condition`."""
    if not condition:
        raise RecipeError(f"algorithm {algorithm!r} cannot fill format {fmt.name!r}: {expected}")


def relative_error(weight: Tensor, values: Tensor, gathered: Gathered = None) -> float:
    """||(W - Q) X||^2 / ||W X||^2 over the calibration tokens; without them ||W - Q||^2 / ||W||^2.

    Input norms alone stand for inputs without correlations.
    """

    def energy(matrix: Tensor) -> float:
        if isinstance(gathered, Hessian):
            moved = matrix @ gathered.mean()
        else:
            moved = matrix if gathered is None else matrix * gathered.squares
        return float(torch.linalg.vecdot(moved, matrix).sum(dtype=torch.float64))

    return energy(weight - values) / max(energy(weight), 1e-30)
