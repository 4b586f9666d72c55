"""How large the columns of an input are: what scales follow."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress_methods.algorithms import Statistic
from compress_methods.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


class MeanMagnitude(Statistic):
    """Mean of |x_j| over all tokens: [cols] float32."""

    def __init__(self, cols: int, device: torch.device) -> None:
        super().__init__(cols, device)
        self._sum = torch.zeros(cols, device=device, dtype=torch.float64)

    def add_batch(self, x: Tensor) -> None:
        self._sum += x.abs().sum(0)

    def result(self) -> Tensor:
        return (self._sum / max(1, self.tokens)).float()


class PeakMagnitude(Statistic):
    """Largest |x_j| of all tokens: [cols] float32."""

    def __init__(self, cols: int, device: torch.device) -> None:
        super().__init__(cols, device)
        self._peak = torch.zeros(cols, device=device)

    def add_batch(self, x: Tensor) -> None:
        self._peak = torch.maximum(self._peak, x.abs().amax(0))

    def result(self) -> Tensor:
        return self._peak
