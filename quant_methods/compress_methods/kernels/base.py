"""What a kernel is: a runtime layout and a product with it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from compress_methods.formats.base import Format, Prepared


class Operator(NamedTuple):
    """Called as function(x, bias, *settings, *tensors of the prepared matrix)."""

    function: Callable[..., Tensor]
    settings: tuple[int, ...]


class Kernel(ABC):
    """Stateless; `name` travels in `Prepared`, the tensors beside it."""

    name: ClassVar[str]
    gathers: ClassVar[bool] = False

    @abstractmethod
    def supports(self, fmt: Format, rows: int, cols: int, device: torch.device) -> bool:
        """Whether this kernel multiplies a [rows, cols] matrix of that format on that device."""

    def takes_unasked(self, fmt: Format) -> bool:
        """Whether it may be chosen by itself: false where it would cost quality that shows."""
        return True

    @abstractmethod
    def prepare(self, fmt: Format, stored: list[Tensor], rows: int, cols: int) -> list[Tensor]:
        """Stored tensors, in the order of `fmt.tensors`, to runtime tensors (owned copies)."""

    @abstractmethod
    def matmul(self, fmt: Format, x: Tensor, prepared: Prepared, bias: Tensor | None) -> Tensor:
        """[tokens, cols] -> [tokens, rows] in x.dtype."""

    def operator(self, fmt: Format, prepared: Prepared) -> Operator | None:
        """The product as one torch operator, where there is one: it saves Python's part."""
        return None

    def embed(self, fmt: Format, ids: Tensor, prepared: Prepared) -> Tensor:
        """Rows `ids` [n] -> [n, cols] float32; only where `gathers`."""
        raise NotImplementedError(f"{self.name} cannot look rows up")
