"""What training asks of a format: a solution that moves by gradients, and settles bit by bit.

A `Relaxed` holds what a matrix is made of as float32 parameters: codes that need not be whole yet,
factors of the scales. `matrix` is differentiable in all of them. `settle` makes more and more of
what has to be whole so, what is nearest to it first, for good; once all is settled, `matrix` gives
exactly the values that `solution` stores.

A parameter is measured so that 1 is a step of what is stored (of a code, of a value's own size),
and moves by `rates` of that: one learning rate then fits all formats.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from compress_methods.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

WITHIN = 0.4
"""How far from a whole number what is held may be."""
LEAST_FACTOR = 0.25
"""Of a scale; the largest is 1 over it."""


class Relaxed(ABC):
    """A solution under training. `parameters` change in place, by `move` and `settle` alone; the
    last axis of each holds what is of one size."""

    parameters: dict[str, Tensor]
    rates: Mapping[str, float]

    @abstractmethod
    def matrix(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """[rows, cols] float32 values, differentiable in all `parameters`."""

    @abstractmethod
    def move(self, steps: Mapping[str, Tensor]) -> None:
        """Subtract steps from what is not settled, as far as what is stored reaches."""

    def settle(self, share: float) -> None:  # noqa: B027
        """Have at least this share of what must be whole be so from now on; 1 is everything."""

    def whole(self, parameters: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The parameters with all that has to be whole rounded; gradients pass as if nothing was
        rounded."""
        return parameters

    def hold(self, solution: Any) -> None:  # noqa: B027
        """Bring what has to be whole to where it is rounded to a solution's own."""

    def limit(self, parameters: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Bring parameters back, in place, to where what is stored reaches."""

    def state(self) -> dict[str, Tensor]:
        """Every tensor that training changes, in place."""
        return self.parameters

    @abstractmethod
    def solution(self) -> Any:
        """The format's solution that the parameters now come to, the rest rounded."""

    def gradients(self, upstream: Tensor) -> dict[str, Tensor]:
        """Gradients of all parameters, of a loss whose gradient by the matrix is `upstream`."""
        leaves = {name: value.detach().requires_grad_() for name, value in self.parameters.items()}
        with torch.enable_grad():
            matrix = self.matrix(leaves)
            found = torch.autograd.grad(matrix, list(leaves.values()), upstream, allow_unused=True)
        return {
            name: torch.zeros_like(leaf) if gradient is None else gradient
            for (name, leaf), gradient in zip(leaves.items(), found, strict=True)
        }


def stored_as(values: Tensor, dtype: torch.dtype) -> Tensor:
    """What `dtype` holds of values, as float32; gradients pass as if nothing was rounded."""
    return values.detach().to(dtype).float() + (values - values.detach())


def rounded(values: Tensor) -> Tensor:
    """Whole numbers; gradients pass as if nothing was rounded."""
    return values.detach().round() + (values - values.detach())


class RelaxedCodes(Relaxed):
    """`codes`, not whole until they are settled; `factors` of the scales, where these move."""

    rates = MappingProxyType({"codes": 1.0, "factors": 0.1})

    def __init__(self, codes: Tensor, top: int, scales: Tensor | None) -> None:
        """`codes` float32, which become the parameter, may reach from 0 to `top`."""
        self._top = top
        self.parameters = {"codes": codes.clamp_(0, top)}
        if scales is not None:
            self.parameters["factors"] = torch.ones_like(scales)
        self._settled = torch.zeros_like(codes, dtype=torch.bool)

    def whole(self, parameters: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {n: v if n == "factors" else rounded(v) for n, v in parameters.items()}

    def limit(self, parameters: Mapping[str, Tensor]) -> None:
        for name, value in parameters.items():
            value.clamp_(
                *((LEAST_FACTOR, 1 / LEAST_FACTOR) if name == "factors" else (0, self._top))
            )

    def move(self, steps: Mapping[str, Tensor]) -> None:
        self.parameters["codes"].sub_(steps["codes"].masked_fill(self._settled, 0))
        if "factors" in self.parameters:
            self.parameters["factors"].sub_(steps["factors"])
        self.limit(self.parameters)

    def state(self) -> dict[str, Tensor]:
        return {**self.parameters, "settled": self._settled}

    def settle(self, share: float) -> None:
        codes = self.parameters["codes"]
        count = round(share * codes.numel())
        if count == 0:
            return
        distance = (codes - codes.round()).abs_().masked_fill_(self._settled, -1)
        self._settled.copy_(distance <= distance.flatten().kthvalue(count).values)
        codes.copy_(torch.where(self._settled, codes.round(), codes))

    def hold_codes(self, own: Tensor) -> None:
        """Bring codes to where they are rounded to `own`."""
        codes = self.parameters["codes"]
        torch.clamp(codes, own - WITHIN, own + WITHIN, out=codes)
        self.limit(self.parameters)
