"""Which factors to move along an edge: a grid of strengths, each tried on the block as it will be
packed.

A trial folds the factors in, rounds the matrices that read the edge to the nearest values of the
format that follows and has it quantize their inputs, then runs the block. The error of its outputs
counts channel by channel, as a share of what the block's outputs are there: a channel that is fifty
times as large, and whose next reader takes a fiftieth of it, must not decide alone. Nothing folded
is the first candidate, so a search never chooses worse than that on the text it sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from compress_methods.algorithms import Statistic
from compress_methods.errors import RecipeError
from compress_methods.lazy import torch
from compress_methods.transforms.base import Part, Pass
from compress_methods.transforms.folding.edge import Edge, difference, few_states, placed
from compress_methods.transforms.folding.edges import find_edges, tolerance, unread

if TYPE_CHECKING:
    from torch import Tensor, nn

WIDEST = 1e4
"""Factors are kept within this of each other: beyond it a norm's gains leave float16."""


@dataclass(frozen=True)
class Smoothing(Pass):
    """`alpha` from 0 to 1 is how far a scale follows the inputs rather than the weights; searched
    edge by edge in `grid` steps where it is not given."""

    alpha: float | None = None
    grid: int = 20
    statistic: ClassVar[type[Statistic]]
    """Of each input column: what factors follow."""

    def __post_init__(self) -> None:
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise RecipeError(f"alpha is {self.alpha}, expected a number from 0 to 1")
        if self.grid < 1:
            raise RecipeError(f"grid is {self.grid}, expected an integer from 1")

    def check_sweep(self, packs: bool) -> None:
        if self.alpha is None and not packs:
            raise RecipeError(
                f"{self.name}: no packing follows in this sweep, so there is no alpha to search "
                "for; give alpha, or put the transform right before the packing"
            )

    def factors(self, inputs: Tensor, weights: Tensor, alpha: float) -> Tensor:
        """Factors [channels] of what inputs and weights come to in each channel."""
        return inputs**alpha / weights ** (1 - alpha)

    def visit(self, part: Part) -> None:
        """Find the edges of a block and fold the best factors into each."""
        if part.index is None or part.index < 0:
            return
        if self.alpha is None and not any(part.packing(slot) for slot in part.slots):
            return
        states = few_states(part)
        edges = find_edges(part, states)
        for slot in unread(part, edges):
            part.note(slot.module, f"{self.name}: no layer before it can take a scale")
        for edge, inputs in zip(edges, self._inputs(part, edges), strict=True):
            self._fold(part, edge, _by_channel(edge, inputs), states)

    def _inputs(self, part: Part, edges: list[Edge]) -> list[Tensor]:
        """The statistic of what is read along each edge, over all calibration text."""
        gathered = []
        with ExitStack() as stack:
            for edge in edges:
                statistic = self.statistic(len(edge.channel), edge.channel.device)
                gathered.append(statistic)
                stack.callback(_watch(part, edge, statistic))
            with torch.no_grad():
                for piece in part.inputs().split(part.batch):
                    part.forward(piece)
        return [statistic.result() for statistic in gathered]

    def _fold(self, part: Part, edge: Edge, inputs: Tensor, states: Tensor) -> None:
        """Choose the strength for an edge and replace its parameters."""
        weights = torch.stack([part.weight(slot).float().abs().amax(0) for slot in edge.readers])
        peaks = _by_channel(edge, weights.amax(0))
        if self.alpha is not None:
            chosen = bounded(self.factors(inputs, peaks, self.alpha))
        else:
            chosen = self._search(Trial(part, edge, states), inputs, peaks)
        if bool((chosen == 1).all()):
            return
        values = edge.folded(part, chosen)
        with torch.no_grad():
            before = part.forward(states)
        with placed(part, values):
            # What is kept in 16 bits is rounded once more; a layer that is clipped shows here too.
            bad = difference(part, states, before) > max(tolerance(before), 1e-2)
        if bad:
            what = f"{self.name}: the block would compute something else with scales"
            part.note(edge.readers[0].module, what)
            return
        for name, value in values.items():
            part.replace(name, value)

    def _search(self, trial: Trial, inputs: Tensor, peaks: Tensor) -> Tensor:
        """The factors of least error: every fourth strength first, then those around the best."""
        tried = {-1: torch.ones_like(inputs)}
        errors = {-1: trial.error(tried[-1])}

        def attempt(step: int) -> None:
            if step not in errors and 0 <= step <= self.grid:
                tried[step] = bounded(self.factors(inputs, peaks, step / self.grid))
                errors[step] = trial.error(tried[step])

        for step in (*range(0, self.grid, 4), self.grid):
            attempt(step)
        for stride in (2, 1):
            best = min((step for step in errors if step >= 0), key=errors.__getitem__)
            attempt(best - stride)
            attempt(best + stride)
        return tried[min(errors, key=errors.__getitem__)]


def bounded(factors: Tensor) -> Tensor:
    """Positive and around 1; a channel that is always zero keeps its values."""
    dead = ~factors.isfinite() | (factors <= 0)
    logs = factors.clamp(min=1e-30).log()
    middle = logs[~dead].mean() if bool((~dead).any()) else logs.new_zeros(())
    half = torch.log(torch.tensor(WIDEST)).item() / 2
    moved = (logs - middle).clamp(-half, half).exp()
    return torch.where(dead, torch.ones_like(moved), moved)


def _by_channel(edge: Edge, columns: Tensor) -> Tensor:
    """The largest of the columns [cols] that share each of the writer's channels."""
    found = columns.new_zeros(edge.writer.channels)
    return found.scatter_reduce(0, edge.channel, columns, "amax")


def _watch(part: Part, edge: Edge, statistic: Statistic) -> Callable[[], None]:
    """Feed a statistic with what is read along an edge; returns how to stop that."""

    def feed(x: Tensor) -> None:
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        statistic.add_batch(rows)
        statistic.tokens += len(rows)

    reader = next((slot for slot in edge.readers if not slot.index), None)
    if reader is not None:
        module = submodule(part, reader.module)
        return module.register_forward_pre_hook(lambda _, args: feed(args[0])).remove
    # Experts have no module of their own, but what they read is what the norm writes.
    module = submodule(part, edge.writer.name)
    return module.register_forward_hook(lambda _, args, out: feed(out)).remove


def submodule(part: Part, name: str) -> nn.Module:
    """A module of the block by its name in the model."""
    return part.module.get_submodule(name.removeprefix(f"{part.prefix}."))


class Trial:
    """What a block's outputs lose where factors are folded along an edge and its readers packed."""

    def __init__(self, part: Part, edge: Edge, states: Tensor) -> None:
        self.part, self.edge, self.states = part, edge, states
        self.expected = self._forward()
        square = self.expected.double().square().mean((0, 1))
        self.size = square + 1e-30

    def _forward(self) -> Tensor:
        with torch.no_grad():
            return self.part.forward(self.states).float()

    def error(self, factors: Tensor) -> float:
        """Mean over channels of squared errors, each as a share of the channel's square."""
        values = self.edge.folded(self.part, factors)
        for slot in self.edge.readers:
            fmt = self.part.packing(slot)
            if fmt is not None:
                view = slot.of(values[slot.parameter])
                view.copy_(fmt.matrix(fmt.nearest(view.contiguous())))
        with placed(self.part, values), self._quantized_inputs():
            lost = (self._forward() - self.expected).double().square().mean((0, 1))
        error = float((lost / self.size).mean())
        return error if error == error else float("inf")

    @contextmanager
    def _quantized_inputs(self) -> Iterator[None]:
        """Have the readers treat their inputs as their formats do."""
        with ExitStack() as stack:
            for slot in self.edge.readers:
                fmt = self.part.packing(slot)
                if fmt is None or slot.index:
                    continue
                module = submodule(self.part, slot.module)

                def hook(_: Any, args: tuple[Any, ...], fmt: Any = fmt) -> tuple[Any, ...]:
                    return (fmt.quantize_activations(args[0]), *args[1:])

                stack.callback(module.register_forward_pre_hook(hook).remove)
            yield
