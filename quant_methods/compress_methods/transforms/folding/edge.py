"""An edge: channels that one module writes and matrices read, and how factors move along it.

With a factor s_j > 0 for every channel, what is written is divided by s and the columns that read
it are multiplied by s. A norm's gain becomes (o + w) / s - o, where o is 1 for gains that are
1 + w and else 0, its bias b / s; the rows of a matrix and its bias are divided likewise. Where a
gain is rounded to the dtype it is stored in, s becomes what was really divided by, so that nothing
is lost.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress_methods.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from compress_methods.model.slot import Slot
    from compress_methods.transforms.base import Part
    from compress_methods.transforms.folding.orthogonal import Orthogonal

FEW = 2

Values = dict[str, "Tensor"]
"""Parameters by their names in the model."""


class Writer(ABC):
    """What writes `channels` channels."""

    name: str
    channels: int

    @abstractmethod
    def divided(self, part: Part, factors: Tensor) -> tuple[Values, Tensor]:
        """Its parameters divided by factors [channels], and the factors that it came to."""

    def turned(self, part: Part, turn: Orthogonal, size: int) -> Values | None:
        """Its parameters so that every `size` channels in a row are turned; None where it writes
        each channel on its own."""
        return None


@dataclass(frozen=True)
class Gains(Writer):
    """A norm whose gains are its weight plus `offset`."""

    name: str
    channels: int
    offset: float
    bias: bool

    def divided(self, part: Part, factors: Tensor) -> tuple[Values, Tensor]:
        weight = part.tensor(f"{self.name}.weight")
        gains = weight.float() + self.offset
        made = part.rounded(f"{self.name}.weight", gains / factors - self.offset)
        left = made.float() + self.offset
        came = torch.where((left != 0) & (gains != 0), gains / left, factors)
        values = {f"{self.name}.weight": made}
        if self.bias:
            bias = part.tensor(f"{self.name}.bias").float()
            values[f"{self.name}.bias"] = part.rounded(f"{self.name}.bias", bias / came)
        return values, came


@dataclass(frozen=True)
class Rows(Writer):
    """Some rows of a matrix: `rows` [channels] of `slot`."""

    slot: Slot
    rows: Tensor
    bias: bool

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.slot.module

    @property
    def channels(self) -> int:  # type: ignore[override]
        return len(self.rows)

    def divided(self, part: Part, factors: Tensor) -> tuple[Values, Tensor]:
        name = self.slot.parameter
        values = {name: part.tensor(name).float().clone()}
        self.slot.of(values[name])[self.rows] /= factors[:, None]
        if self.bias:
            bias = part.tensor(f"{self.name}.bias").float().clone()
            bias[self.rows] /= factors
            values[f"{self.name}.bias"] = bias
        return {key: part.rounded(key, value) for key, value in values.items()}, factors

    def turned(self, part: Part, turn: Orthogonal, size: int) -> Values:
        name = self.slot.parameter
        values = {name: part.tensor(name).float().clone()}
        view = self.slot.of(values[name])
        heads = view[self.rows].unflatten(0, (-1, size)).transpose(1, 2)
        view[self.rows] = turn.turn(heads).transpose(1, 2).flatten(0, 1)
        if self.bias:
            bias = part.tensor(f"{self.name}.bias").float().clone()
            bias[self.rows] = turn.turn(bias[self.rows].unflatten(0, (-1, size))).flatten()
            values[f"{self.name}.bias"] = bias
        return values


@dataclass(frozen=True)
class Edge:
    """`channel` [cols] is the one of the writer's that each column of the `readers` takes. `others`
    are parameters that read it too without being slots, with the axis of their columns."""

    writer: Writer
    readers: tuple[Slot, ...]
    channel: Tensor
    others: Mapping[str, int]

    @property
    def name(self) -> str:
        leaves = [s.module.rpartition(".")[2] if not s.index else "experts" for s in self.readers]
        return f"{self.writer.name} -> {', '.join(dict.fromkeys(leaves))}"

    def folded(self, part: Part, factors: Tensor) -> Values:
        """New values of all parameters of the edge, for factors [channels] of the writer's."""
        values, came = self.writer.divided(part, factors)
        columns = came[self.channel]
        for slot in self.readers:
            if slot.parameter not in values:
                values[slot.parameter] = part.tensor(slot.parameter).float().clone()
            slot.of(values[slot.parameter]).mul_(columns)
        for name, axis in self.others.items():
            tensor = part.tensor(name).float()
            shape = [1] * tensor.dim()
            shape[axis] = -1
            values[name] = tensor * columns.view(shape)
        return values


@contextmanager
def placed(part: Part, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Have the block compute with other values, for a while."""
    held = {name: part.tensor(name).clone() for name in values}
    try:
        for name, value in values.items():
            part.tensor(name).copy_(value)
        yield
    finally:
        for name, value in held.items():
            part.tensor(name).copy_(value)


def few_states(part: Part, count: int = FEW) -> Tensor:
    """States of as few sequences from `count` on as the block takes: some are called with masks for
    a whole batch."""
    whole = part.inputs()[: part.batch]
    if count >= len(whole):
        return whole
    with torch.no_grad():
        expected = part.forward(whole)[:count]
        try:
            found = part.forward(whole[:count])
        except RuntimeError:
            return whole
    same = found.shape == expected.shape and torch.allclose(found, expected, rtol=0.05, atol=1e-3)
    return whole[:count] if same else whole


def difference(part: Part, states: Tensor, expected: Tensor) -> float:
    """How far the block's outputs [sequences, length, hidden] are from those expected, as a share
    of what the block adds to the states; infinite where they are not finite."""
    with torch.no_grad():
        found = part.forward(states)
    lost = (found.double() - expected.double()).norm()
    added = (expected.double() - states.to(expected.device).double()).norm()
    share = float(lost / added.clamp(min=1e-30))
    return share if share == share else float("inf")
