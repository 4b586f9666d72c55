"""The residual stream of a block: the norms that read it and the matrices that write into it.

Found in a `Trace`: a matrix writes into the stream where the gradient by its outputs is the one by
the stream, at the block's end or where a norm reads it.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress_methods.errors import RecipeError
from compress_methods.lazy import torch
from compress_methods.transforms.folding.edge import Edge, Values
from compress_methods.transforms.folding.edges import candidates_of_norms
from compress_methods.transforms.folding.trace import Trace

if TYPE_CHECKING:
    from torch import Tensor, nn

    from compress_methods.model.slot import Slot
    from compress_methods.transforms.base import Part
    from compress_methods.transforms.folding.orthogonal import Orthogonal

PARALLEL = 1 - 1e-4


@dataclass(frozen=True)
class Stream:
    """`norms`: edges of the norms that read the stream, each with its `gain_offset`; `writers`:
    matrices that write into it."""

    norms: tuple[tuple[Edge, float], ...]
    writers: tuple[Slot, ...]

    @classmethod
    def of(cls, part: Part, states: Tensor, what: str) -> Stream:
        """Of a block given its states [sequences, length, hidden]; `RecipeError` names what reads
        or scales the stream in another way, `what` is what wanted to know."""
        trace, width = Trace(part, states), states.shape[-1]
        found: dict[str, tuple[Edge, float]] = {}
        for edge in candidates_of_norms(part, trace):
            name = edge.writer.name
            offset = gain_offset(trace.module(name), width)
            if offset is None:
                raise RecipeError(f"{what}: {name} is no RMS norm")
            if edge.others or any(slot.index for slot in edge.readers):
                raise RecipeError(f"{what}: {name} is read by experts, which are not turned")
            found[name] = edge, offset
        points = [trace.ends, *(trace.arrivals[n] for n in found if trace.arrivals.get(n))]
        read = {slot.module for edge, _ in found.values() for slot in edge.readers}
        writers = []
        for name, slot in trace.matrices.items():
            mine = trace.runs[name].gradients
            if slot.rows == width and any(_parallel(mine, point) for point in points):
                writers.append(slot)
        for name in trace.norms:
            if name not in found and trace.writes(name).sums.shape[1] == width:
                raise RecipeError(
                    f"{what}: {name} scales the residual stream, or is read by more than matrices"
                )
        for name, slot in trace.matrices.items():
            if slot.cols == width and name not in read and slot not in writers:
                raise RecipeError(f"{what}: {name} reads the residual stream without a norm")
        return cls(tuple(found.values()), tuple(writers))

    def turned(self, part: Part, turn: Orthogonal) -> Values:
        """The parameters of a block that computes the same on states x Q, gains folded."""
        values: Values = {}

        def value(name: str) -> Tensor:
            if name not in values:
                values[name] = part.tensor(name).float().clone()
            return values[name]

        for edge, offset in self.norms:
            weight = value(f"{edge.writer.name}.weight")
            factors = weight + offset
            for slot in edge.readers:
                view = slot.of(value(slot.parameter))
                view.copy_(turn.turn(view * factors))
            weight.fill_(1 - offset)
        for slot in self.writers:
            view = slot.of(value(slot.parameter))
            view.copy_(turn.turn(view.T.contiguous()).T)
            module = part.module.get_submodule(slot.module.removeprefix(f"{part.prefix}."))
            if module._parameters.get("bias") is not None:
                bias = f"{slot.module}.bias"
                values[bias] = turn.turn(part.tensor(bias).float())
        return values


def gain_offset(norm: nn.Module, width: int) -> float | None:
    """What a norm adds to its weight, 0 or 1; None where it does something else besides scaling
    x / rms(x), as one that subtracts a mean or adds a bias does."""
    if any(name != "weight" for name, value in norm._parameters.items() if value is not None):
        return None
    mine = copy.deepcopy(norm).to_empty(device="cpu").float()
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(4, width, generator=draw) + 1
    expected = x * x.square().mean(-1, keepdim=True).rsqrt()
    for offset in (0.0, 1.0):
        weight = torch.rand(width, generator=draw) + 0.5
        mine._parameters["weight"] = torch.nn.Parameter(weight - offset, requires_grad=False)
        with torch.no_grad():
            if torch.allclose(mine(x), expected * weight, rtol=1e-3, atol=1e-4):
                return offset
    return None


def _parallel(mine: list[Tensor], other: list[Tensor]) -> bool:
    a = torch.cat([g.flatten() for g in mine]).double()
    b = torch.cat([g.flatten() for g in other]).double()
    return a.shape == b.shape and bool(torch.cosine_similarity(a, b, dim=0) > PARALLEL)
