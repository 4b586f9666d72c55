"""refining: the packed matrices of a block trained together, see `algorithms/refine.py`.

In memory, besides states in main memory: the block, its gradient, codes and their momentum, a few
temporaries of one matrix, and the best iterate, packed: less than six blocks, and the activations
of `ELEMENTS` values of states.

What an iteration does depends on its number alone. Every `SAVE_SECONDS` everything that moves is
written to the work folder; a conversion that was killed goes on there, to the same bytes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from compress_methods.algorithms.base import Refinement
from compress_methods.algorithms.refine import SETTLED
from compress_methods.checkpoint.integrity import digest, read_checked, write_checked
from compress_methods.conversion.part import BlockPart, Facts
from compress_methods.conversion.planning.plan import Job
from compress_methods.errors import CalibrationError
from compress_methods.formats import torch_dtype
from compress_methods.formats.relaxed import Relaxed

SAVED = "refining.safetensors"
"""In the work folder: the block that is being trained."""
CHECKED = 16
"""Sequences that the best iterate is chosen by."""
LEFT_OUT = 0.001
FEW_BITS = 4
SAVE_SECONDS = 60.0
ELEMENTS = {"cpu": 2**20, "cuda": 2**25}
"""Values of states that go through a block at once."""
TINY = 1e-30
MOMENTUM, MEMORY = 0.9, 0.98
"""What is left after an iteration of the gradient's mean and of its mean square."""
STAGES = 50
"""How often more codes settle."""
CHECKS = 10
"""How often the loss is measured."""


@dataclass(frozen=True)
class Solved:
    """A matrix as the start has packed it, and relaxed from what the start has aimed at."""

    job: Job
    tensors: Mapping[str, Tensor]
    relaxed: Relaxed


def refine_block(
    part: BlockPart, solved: Sequence[Solved], settings: Refinement, kept: Path | None = None
) -> tuple[list[dict[str, Tensor]], Facts]:
    """Train the matrices `solved` of a block, whose values are in the model; the rest stays.

    Returns the packed tensors of each, whose values are then in the model, and for the report
    `{iterations, best, loss: [[iteration, settled, loss], ...]}`. `kept`: where a conversion that
    was killed goes on from. Raises `CalibrationError` where the loss is not finite.
    """
    training = _Training(part, solved, settings)
    save = _Saved(kept, training)
    if not save.load():
        training.look()
    training.put()
    with _differentiable(part, solved) as parameters:
        while training.iteration < settings.iterations:
            training.step(parameters)
            if training.iteration % training.interval == 0:
                training.look()
            save.sometimes()
    training.look()
    training.put_best()
    return training.best, training.facts()


class _Training:
    """A block between two iterations."""

    def __init__(self, part: BlockPart, solved: Sequence[Solved], settings: Refinement) -> None:
        self.part, self.solved, self.settings = part, solved, settings
        self.relaxed = [s.relaxed for s in solved]
        self.momenta = [
            {name: torch.zeros_like(value) for name, value in relaxed.parameters.items()}
            for relaxed in self.relaxed
        ]
        self.squares = [
            {name: value.new_zeros(*value.shape[:-1], 1) for name, value in r.parameters.items()}
            for r in self.relaxed
        ]
        self.inputs, self.wanted = part.inputs(), part.teacher()
        count, length, width = self.inputs.shape
        self.piece = max(1, ELEMENTS[part.device.type] // (length * width))
        self.checked = torch.arange(count)[:: -(-count // CHECKED)]
        self.left_out = _left_out(solved, settings)
        self.interval = max(1, settings.iterations // CHECKS)
        self.iteration, self.best_iteration = 0, 0
        self.losses: list[tuple[int, float, float]] = []
        self.best = [dict(s.tensors) for s in solved]

    @property
    def settled(self) -> float:
        """The share of codes that is whole after so many iterations; all of the start's are."""
        if self.iteration == 0:
            return 1.0
        return _settled(self.iteration, self.settings.iterations)

    def step(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """One iteration."""
        rows = self._drawn()
        for piece in rows.split(self.piece):
            with torch.enable_grad():
                loss = self._loss(piece) * (len(piece) / len(rows))
            loss.backward()
        self.iteration += 1
        for index, solved in enumerate(self.solved):
            slot = solved.job.slot
            upstream = parameters[slot.parameter].grad
            if upstream is not None:
                self._move(index, slot.of(upstream).float())
        for parameter in parameters.values():
            parameter.grad = None
        self.put()

    def _move(self, index: int, upstream: Tensor) -> None:
        """Move what a matrix is made of, and settle some."""
        relaxed, count = self.relaxed[index], self.iteration
        steps = {}
        for name, gradient in relaxed.gradients(upstream).items():
            momentum, square = self.momenta[index][name], self.squares[index][name]
            momentum.lerp_(gradient, 1 - MOMENTUM)
            square.lerp_(gradient.square_().mean(-1, keepdim=True), 1 - MEMORY)
            size = (square / (1 - MEMORY**count)).sqrt_().clamp_(min=TINY)
            rate = self.settings.rate_at(count - 1) * relaxed.rates[name]
            steps[name] = momentum / size * (rate / (1 - MOMENTUM**count))
        relaxed.move(steps)
        if self.settled != _settled(count - 1, self.settings.iterations):
            relaxed.settle(self.settled)

    def put(self) -> None:
        """Have the block compute with what is trained, as far as it has come."""
        for solved, relaxed in zip(self.solved, self.relaxed, strict=True):
            self.part.weight(solved.job.slot).copy_(relaxed.matrix(relaxed.parameters))

    def _drawn(self) -> Tensor:
        """The sequences of this iteration: all in a new order, then again."""
        count = len(self.inputs)
        batch = min(self.settings.batch, count)
        epoch, place = divmod(self.iteration, count // batch)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(epoch))
        return order[place * batch : (place + 1) * batch]

    def _loss(self, rows: Tensor) -> Tensor:
        """Mean over tokens of ||found - wanted||^2 / ||wanted||^2, the largest errors left out."""
        device = self.part.device
        wanted = self.wanted[rows].to(device).float()
        reduced = torch_dtype(self.settings.precision)
        with torch.autocast(device.type, reduced, enabled=reduced != torch.float32):
            found = self.part.forward(self.inputs[rows]).float()
        energy = wanted.square().sum(-1, keepdim=True).clamp_(min=TINY)
        errors = (found - wanted).square() / energy
        if self.left_out:
            flat = errors.detach().flatten()
            kept = max(1, round(len(flat) * (1 - self.left_out)))
            errors = errors * (errors.detach() <= flat.kthvalue(kept).values)
        return errors.sum() / energy.numel()

    @torch.no_grad()
    def look(self) -> None:
        """Measure the loss as it is, and keep what can be stored if it is the best so far."""
        if self.losses and self.losses[-1][0] == self.iteration:
            return
        pieces = self.checked.split(self.piece)
        total = sum(float(self._loss(rows)) * len(rows) for rows in pieces)
        loss = total / len(self.checked)
        if not math.isfinite(loss):
            raise CalibrationError(
                f"{self.part.prefix}: refining it gives a loss of {loss}; calibration activations "
                "may overflow"
            )
        if self.settled == 1 and self.losses and loss < self._least():
            self.best, self.best_iteration = self._pack(), self.iteration
        self.losses.append((self.iteration, self.settled, loss))
        note = f"{self.part.prefix}, refined {self.iteration} of {self.settings.iterations} times"
        self.part.progress.step(0, note)

    def _least(self) -> float:
        """The least loss of what could be stored."""
        return min(loss for _, settled, loss in self.losses if settled == 1)

    def _pack(self) -> list[dict[str, Tensor]]:
        """What is trained, as it would be stored."""
        return [
            solved.job.format.pack(relaxed.solution())
            for solved, relaxed in zip(self.solved, self.relaxed, strict=True)
        ]

    def put_best(self) -> None:
        """Have the block compute with the best iterate."""
        for solved, tensors in zip(self.solved, self.best, strict=True):
            self.part.weight(solved.job.slot).copy_(solved.job.format.unpack(tensors))

    def facts(self) -> Facts:
        return {
            "iterations": self.iteration,
            "best": self.best_iteration,
            "loss": [list(found) for found in self.losses],
        }

    def state(self) -> dict[str, Tensor]:
        """Everything that a later iteration depends on."""
        found = {
            "counts": torch.tensor([self.iteration, self.best_iteration]),
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            **self._moving(),
        }
        for index, best in enumerate(self.best):
            found |= {f"{index}.best.{name}": value for name, value in best.items()}
        return {name: value.cpu() for name, value in found.items()}

    def _moving(self) -> dict[str, Tensor]:
        """The tensors that change in place, by names of the file."""
        found: dict[str, Tensor] = {}
        for index, relaxed in enumerate(self.relaxed):
            for kind, tensors in (
                ("value", relaxed.state()),
                ("momentum", self.momenta[index]),
                ("square", self.squares[index]),
            ):
                found |= {f"{index}.{kind}.{name}": value for name, value in tensors.items()}
        return found

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take up a `state`."""
        self.iteration, self.best_iteration = map(int, state["counts"])
        self.losses = [(int(at), share, loss) for at, share, loss in state["losses"].tolist()]
        for name, value in self._moving().items():
            value.copy_(state[name])
        for index, best in enumerate(self.best):
            for name in best:
                best[name] = state[f"{index}.best.{name}"].to(self.part.device)


def _settled(iteration: int, iterations: int) -> float:
    """The share of codes that is whole; it grows in `STAGES`, since finding the nearest ones takes
    time."""
    stages = min(STAGES, iterations)
    share = min(1.0, iteration * stages // iterations / stages / SETTLED)
    return 1 - (1 - share) ** 2


class _Saved:
    """The file in the work folder that a killed conversion goes on from."""

    def __init__(self, path: Path | None, training: _Training) -> None:
        self.path, self.training = path, training
        start = enumerate(training.best)
        named = {f"{i}.{n}": t.cpu() for i, found in start for n, t in found.items()}
        self._key = torch.frombuffer(bytearray(digest(named)), dtype=torch.uint8)
        self._saved = time.monotonic()

    def load(self) -> bool:
        """Whether the training could go on from the file, and does: it is whole, and of a training
        with this start."""
        state = None if self.path is None else read_checked(self.path)
        if state is None or not torch.equal(state["start"], self._key):
            return False
        self.training.restore(state)
        return True

    def sometimes(self) -> None:
        """Write the state, unless that was just done."""
        if self.path is not None and time.monotonic() - self._saved >= SAVE_SECONDS:
            write_checked(self.path, {**self.training.state(), "start": self._key})
            self._saved = time.monotonic()


def _left_out(solved: Sequence[Solved], settings: Refinement) -> float:
    """Share of errors that does not count: by default some where matrices have few bits."""
    if settings.left_out is not None:
        return settings.left_out
    slots = [s.job.slot for s in solved]
    weights = sum(slot.rows * slot.cols for slot in slots)
    size = sum(s.job.format.nbytes(s.job.slot.rows, s.job.slot.cols) for s in solved)
    return LEFT_OUT if 8 * size < FEW_BITS * weights else 0.0


@contextmanager
def _differentiable(part: BlockPart, solved: Sequence[Solved]) -> Iterator[dict[str, nn.Parameter]]:
    """The parameters that hold the matrices, by name, while gradients of them are wanted."""
    model = part.planned.skeleton.model
    parameters = {s.job.slot.parameter: model.get_parameter(s.job.slot.parameter) for s in solved}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    try:
        yield parameters
    finally:
        for parameter in parameters.values():
            parameter.requires_grad_(False)
            parameter.grad = None
