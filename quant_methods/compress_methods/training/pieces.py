"""What of a checkpoint is trained, one stored thing each: see `student.py`."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from compress_methods.checkpoint.compressed import Matrix
from compress_methods.checkpoint.safetensors import Entry
from compress_methods.formats import torch_dtype
from compress_methods.formats.relaxed import stored_as
from compress_methods.model.slot import Slot

TINY = 1e-30
CODES_RATE = 0.6
"""Of codes, in steps from one to the next, when that of a scale is 1."""
FAR = 0.5
"""Beyond this relative error a matrix of the same name is not what another was rounded from."""
SPARSE = 0.05
"""A matrix with this share of zeros was pruned: they stay."""
Leaves = Mapping[str, Tensor]


class Piece(ABC):
    """Something stored that is trained: `leaves` are its parameters as training begins, `slots`
    where its values go in the model, and `rates` how fast a leaf moves, 1 unless given. `still`:
    what does not move and is as large as they are. `zeros`: how many values stay zero."""

    leaves: dict[str, Tensor]
    still: Leaves = MappingProxyType({})
    slots: Sequence[Slot | str]
    zeros: int = 0
    rates: Mapping[str, float] = MappingProxyType({})

    @abstractmethod
    def value(self, leaves: Leaves) -> Tensor:
        """What the model computes with, differentiable in `leaves`."""

    @abstractmethod
    def stored(self, leaves: Leaves) -> dict[str, Tensor]:
        """Tensors of the checkpoint, by name."""

    def limit(self, leaves: Leaves) -> None:  # noqa: B027
        """Bring leaves back, in place, to where what is stored reaches."""

    def hand_over(self, device: torch.device) -> None:
        """Keep of `leaves` and `still` no more than shapes, and all else on a device: they lie
        elsewhere, and are given to `value` and `stored` together."""
        for name, held in list(vars(self).items()):
            to = torch.device("meta") if name in ("leaves", "still") else device
            if isinstance(held, Tensor):
                setattr(self, name, held.to(to))
            elif isinstance(held, dict):
                setattr(self, name, {n: t.to(to) for n, t in held.items()})


class Floats(Piece):
    """A tensor kept as floats. `slot`: the matrix that it is, or the parameter's name. Zeros of a
    matrix that was pruned stay zeros."""

    def __init__(self, entry: Entry, slot: Slot | str, device: torch.device) -> None:
        self.entry, self.name = entry, entry.name
        self.slots, self.dtype = [slot], torch_dtype(entry.dtype)
        tensor = entry.read().to(device).float()
        self.unit = _size(tensor)
        self.leaves = {"values": tensor / self.unit}
        empty = tensor == 0
        pruned = tensor.dim() > 1 and empty.float().mean() >= SPARSE
        self.empty = empty if pruned else None
        self.zeros = int(empty.sum()) if pruned else 0

    def value(self, leaves: Leaves) -> Tensor:
        return self._whole(leaves["values"])

    def _whole(self, values: Tensor) -> Tensor:
        """Values in units of the tensor's size as they are stored."""
        found = stored_as(values * self.unit, self.dtype)
        return found if self.empty is None else found.masked_fill(self.empty, 0)

    def stored(self, leaves: Leaves) -> dict[str, Tensor]:
        return {self.name: self.value(leaves).to(self.dtype)}


class Adapted(Floats):
    """Matrices kept as floats, [..., rows, cols], to each of which a product of two thin ones is
    added (LoRA). B starts at random, A at zero: at first nothing is changed."""

    def __init__(
        self,
        entry: Entry,
        slot: Slot | str,
        device: torch.device,
        rank: int,
        generator: torch.Generator,
    ) -> None:
        super().__init__(entry, slot, device)
        values = self.leaves["values"]
        self.still = {"values": values}
        *stack, rows, cols = values.shape
        right = torch.randn(*stack, rank, cols, generator=generator).to(device)
        # So divided, a step of A changes values by as much whatever the rank is.
        self.leaves = {
            "left": values.new_zeros(*stack, rows, rank),
            "right": right / math.sqrt(rank),
        }

    def value(self, leaves: Leaves) -> Tensor:
        held = {**self.still, **leaves}
        return self._whole(held["values"] + held["left"] @ held["right"])


class Packed(Piece):
    """A packed matrix, of which the floats move, but for the tensors `still`."""

    def __init__(
        self,
        matrix: Matrix,
        slots: Sequence[Slot],
        device: torch.device,
        still: Collection[str] = (),
    ) -> None:
        self.module, self.format, self.slots = matrix.module, matrix.format, slots
        self.tensors = {name: e.read().to(device) for name, e in matrix.entries.items()}
        moving = {n: t.float() for n, t in self.tensors.items() if _moves(t) and n not in still}
        self.units = {name: _size(tensor) for name, tensor in moving.items()}
        self.leaves = {name: tensor / self.units[name] for name, tensor in moving.items()}

    def value(self, leaves: Leaves) -> Tensor:
        return self.format.unpack({**self.tensors, **self._moved(leaves)})

    def stored(self, leaves: Leaves) -> dict[str, Tensor]:
        moved = self._moved(leaves)
        found = {n: moved[n].to(t.dtype) if n in moved else t for n, t in self.tensors.items()}
        return {f"{self.module}.{name}": tensor for name, tensor in found.items()}

    def _moved(self, leaves: Leaves) -> dict[str, Tensor]:
        return {
            name: stored_as(leaf * self.units[name], self.tensors[name].dtype)
            for name, leaf in leaves.items()
        }


def _moves(tensor: Tensor) -> bool:
    """Floats of one byte are codes, or scales as coarse as those."""
    return tensor.is_floating_point() and tensor.dtype.itemsize > 1


class Coded(Piece):
    """A packed matrix, of which the codes move, too. `weight` is what it was rounded from, if that
    is known: a code that was chosen narrowly is then the first to change."""

    rates = MappingProxyType({"codes": CODES_RATE})

    def __init__(
        self,
        matrix: Matrix,
        slots: Sequence[Slot],
        device: torch.device,
        weight: Tensor | None = None,
    ) -> None:
        self.module, self.format, self.slots = matrix.module, matrix.format, slots
        tensors = {name: entry.read().to(device) for name, entry in matrix.entries.items()}
        solution = matrix.format.solution(tensors)
        values = matrix.format.matrix(solution)
        if weight is None or _relative_error(weight.to(values), values) > FAR:
            weight = values
        self.relaxed = matrix.format.relax(solution, weight.to(values))
        self.relaxed.hold(solution)
        self.leaves = self.relaxed.parameters

    def value(self, leaves: Leaves) -> Tensor:
        return self.relaxed.matrix(self.relaxed.whole(leaves))

    def limit(self, leaves: Leaves) -> None:
        self.relaxed.limit(leaves)

    def stored(self, leaves: Leaves) -> dict[str, Tensor]:
        whole = self.relaxed.whole(leaves)
        for name, value in self.relaxed.parameters.items():
            value.copy_(whole[name])
        packed = self.format.pack(self.relaxed.solution())
        return {f"{self.module}.{name}": tensor for name, tensor in packed.items()}


def _relative_error(weight: Tensor, values: Tensor) -> float:
    error = (weight - values).square().sum() / weight.square().sum().clamp(min=TINY)
    return float(error)


def _size(tensor: Tensor) -> Tensor:
    """The root mean square, 1 for zeros."""
    size = tensor.square().mean().sqrt()
    return torch.where(size > TINY, size, torch.ones_like(size))
