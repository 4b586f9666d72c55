"""rotation: the residual stream in another basis, in which no channel is an outlier.

QuaRot (Ashkboos et al., 2024, arXiv:2404.00456), the parts that cost nothing at run time. R1: an
RMS norm without gains commutes with an orthogonal Q, so after folding every gain into the matrices
that read its norm, the embedding's rows, what reads the stream and what writes into it are turned:

    E Q,   W diag(g) Q,   Q^T W and Q^T b,   head diag(g) Q

and the model computes what it did, with the energy of an outlier channel spread over all. R2: the
rows of v and the columns of o are turned head by head. Q is a Hadamard matrix with random signs,
see `folding/orthogonal.py`. The result is a plain model of the same class; embedding and head are
stored apart, since only the head takes the last norm's gains.

Norms, readers, writers and heads are found in the running block, and a block is turned only if it
then gives its old outputs, turned. Refused by name: norms that subtract a mean or add a bias
(GPT-2, OPT, Phi), norms behind matrices (Gemma 2 and 3, OLMo 2), matrices that read the stream
without a norm, experts and routers, anything else that adds to the stream outside the blocks.

Needs text. Ends its sweep: turned weights are rounded to the checkpoint's dtype before anything
else. Outliers that arise inside a layer, at the input of down_proj, stay: turning those takes a
transform at run time (the format `rotated`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from compress_methods.errors import RecipeError
from compress_methods.lazy import torch
from compress_methods.transforms.base import Outline, Part, Pass, register_transform
from compress_methods.transforms.folding.edge import Edge, difference, few_states, placed
from compress_methods.transforms.folding.edges import SMALLEST_HEAD, find_edges, tolerance
from compress_methods.transforms.folding.orthogonal import Orthogonal
from compress_methods.transforms.folding.stream import Stream, gain_offset

if TYPE_CHECKING:
    from torch import Tensor

    from compress_methods.model.skeleton import Skeleton


@register_transform
@dataclass(frozen=True)
class Rotation(Pass):
    """`seed` draws the signs; `heads`: whether v and o are turned too."""

    seed: int = 0
    heads: bool = True
    name: ClassVar[str] = "rotation"
    reshapes: ClassVar[bool] = True
    turns: ClassVar[bool] = True

    def plan(self, skeleton: Skeleton) -> Outline:
        last_norm(skeleton)
        return Outline()

    def turned(self, states: Tensor) -> Tensor:
        return Orthogonal(states.shape[-1], self.seed).turn(states)

    def visit(self, part: Part) -> None:
        if part.index is None or part.index < 0:
            self._turn_outside(part)
            return
        states = few_states(part)
        turn = Orthogonal(states.shape[-1], self.seed)
        original = turn.turn_back(states)
        stream = Stream.of(part, original, self.name)
        if self.heads:
            for edge in find_edges(part, original):
                turn_heads(part, edge, original, self.seed)
        with torch.no_grad():
            out = part.forward(original)
        values = stream.turned(part, turn)
        with placed(part, values):
            far = difference(part, states, turn.turn(out)) > 10 * tolerance(out)
        if far:
            raise RecipeError(f"{self.name}: {part.prefix} computes something else once turned")
        for name, value in values.items():
            part.replace(name, value)

    def _turn_outside(self, part: Part) -> None:
        """The rows of the token table, the columns of the head, and the last norm's gains."""
        skeleton = part.skeleton
        norm, offset = last_norm(skeleton)
        gains = part.tensor(f"{norm}.weight").float() + offset
        for slot in part.slots:
            values = part.tensor(slot.parameter).float()
            if slot.module == skeleton.embedding:
                part.replace(f"{norm}.weight", torch.full_like(gains, 1 - offset))
            else:
                values = values * gains
            part.replace(slot.parameter, Orthogonal(len(gains), self.seed).turn(values))


def last_norm(skeleton: Skeleton) -> tuple[str, float]:
    """Name and `gain_offset` of the norm between blocks and head; `RecipeError` names what else
    there is outside the blocks."""
    shapes = skeleton.parameter_names()
    tables = (f"{skeleton.embedding}.weight", f"{skeleton.head}.weight", f"{skeleton.head}.bias")
    width = shapes[tables[0]][1]
    if not skeleton.head:
        raise RecipeError(f"{Rotation.name}: the model has no output head")
    outside = [n for n in shapes if skeleton.block_of(n) is None and n not in tables]
    norms = [name.removesuffix(".weight") for name in outside if shapes[name] == (width,)]
    if len(outside) != 1 or len(norms) != 1:
        odd = next((n for n in outside if shapes[n] != (width,)), ", ".join(outside) or "nothing")
        raise RecipeError(
            f"{Rotation.name}: expected the gains of one norm between blocks and head, found {odd}"
        )
    offset = gain_offset(skeleton.module(norms[0]), width)
    if offset is None:
        raise RecipeError(f"{Rotation.name}: {norms[0]} is no RMS norm")
    return norms[0], offset


def turn_heads(part: Part, edge: Edge, states: Tensor, seed: int) -> None:
    """Turn what is written along an edge head by head: the largest heads that the block's outputs
    do not notice, none where the edge is no attention's."""
    with torch.no_grad():
        out = part.forward(states)
    for size in _head_sizes(edge):
        turn = Orthogonal(size, seed)
        values = edge.writer.turned(part, turn, size)
        if values is None:
            return
        for slot in edge.readers:
            if slot.parameter not in values:
                values[slot.parameter] = part.tensor(slot.parameter).float().clone()
            view = slot.of(values[slot.parameter])
            view.copy_(turn.turn(view.unflatten(1, (-1, size))).flatten(1))
        with placed(part, values):
            same = difference(part, states, out) < 10 * tolerance(out)
        if same:
            for name, value in values.items():
                part.replace(name, value)
            return


def _head_sizes(edge: Edge) -> Iterator[int]:
    """Sizes that heads of the writer's channels may have, the largest first."""
    count = edge.writer.channels
    for size in range(count, 1, -1):
        if count % size == 0 and size >= SMALLEST_HEAD:
            heads = edge.channel.unflatten(0, (-1, size))
            places = torch.arange(size, device=heads.device)
            if bool((heads == heads[:, :1] + places).all()) and not (heads[:, 0] % size).any():
                yield size
