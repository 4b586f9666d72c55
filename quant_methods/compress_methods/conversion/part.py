"""The parts of a model while passes visit them.

`StreamedPart` holds nothing: matrices are read when asked for, a slab at a time where that is
possible. Embeddings are visited so, and blocks when no text runs through the model. `BlockPart` is
a block, or the head, materialized on the device, with the states that go into it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress_methods.algorithms import Seen, Statistic
from compress_methods.algorithms.statistics import Gatherer
from compress_methods.algorithms.summing import summed
from compress_methods.checkpoint.source import Source
from compress_methods.conversion.planning.plan import HEAD_BLOCK, Job, Plan, Shard
from compress_methods.errors import RecipeError
from compress_methods.formats import Format, Stored, torch_dtype
from compress_methods.model.block_runner import BlockRunner
from compress_methods.model.skeleton import Skeleton
from compress_methods.model.slot import Slot
from compress_methods.system.processes import Processes
from compress_methods.system.progress import Progress

Facts = dict[str, Any]


@dataclass(frozen=True)
class Planned:
    """A model and a recipe that fit each other."""

    skeleton: Skeleton
    source: Source
    plan: Plan

    def load(self, runner: BlockRunner, prefix: str) -> None:
        """Put the source's tensors into a module, one by one: no two are there twice."""
        dtype = runner.dtype if runner.device.type == "cpu" else None
        for name in self.skeleton.parameter_names():
            if name.startswith(f"{prefix}."):
                runner.load({name: self.source.read(name, dtype)})


class StreamedPart:
    """A shard whose tensors stay in the checkpoint. `index`: of the block in the source."""

    def __init__(
        self,
        planned: Planned,
        shard: Shard,
        index: int | None,
        device: torch.device,
        progress: Progress,
        processes: Processes | None = None,
    ) -> None:
        self.planned, self.shard, self.index = planned, shard, index
        self.device, self.progress = device, progress
        self.processes = processes or Processes()
        self.jobs = {job.slot.module: job for job in shard.jobs}
        self.edited: dict[str, Tensor] = {}
        self.stored: dict[str, Tensor] = {}
        self.modules: Facts = {}
        self.refined: Facts = {}
        self.notes: dict[str, str] = {}

    @property
    def slots(self) -> Sequence[Slot]:
        skeleton = self.planned.skeleton
        return [s for s in skeleton.slots.values() if self._holds(s.module)]

    def _holds(self, module: str) -> bool:
        skeleton = self.planned.skeleton
        if self.index == HEAD_BLOCK or module == skeleton.head:
            return self.index == HEAD_BLOCK and module == skeleton.head
        return skeleton.block_of(module) == self.index

    @property
    def prefix(self) -> str:
        """Module name of the block, or of the head."""
        skeleton = self.planned.skeleton
        return skeleton.head if self.index == HEAD_BLOCK else f"{skeleton.blocks_name}.{self.index}"

    @property
    def batch(self) -> int:
        return 1

    @property
    def module(self) -> nn.Module:
        raise RecipeError(
            f"{self.shard.name}: no text runs through the model, so no block is loaded"
        )

    @property
    def skeleton(self) -> Skeleton:
        return self.planned.skeleton

    @property
    def config(self) -> Any:
        return self.planned.skeleton.model.config

    def packing(self, slot: Slot) -> Format | None:
        job = self.jobs.get(slot.module)
        return None if job is None else job.format

    def weight(self, slot: Slot) -> Tensor:
        """A copy in float32; `replace` puts back what was changed."""
        if slot.parameter in self.edited:
            return slot.of(self.edited[slot.parameter])
        return self.planned.source.read_slot(slot).to(self.device).float()

    def original(self, slot: Slot) -> Tensor:
        return StreamedPart.weight(self, slot)

    def slabs(self, slot: Slot, multiple: int) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows) pieces of a matrix as it now is, in any float dtype."""
        if slot.parameter in self.edited:
            yield 0, self.weight(slot)
            return
        for first, slab in self.planned.source.slot_slabs(slot, multiple):
            yield first, slab.to(self.device)

    def tensor(self, name: str) -> Tensor:
        if name in self.edited:
            return self.edited[name]
        return self.planned.source.read(name).to(self.device).float()

    def replace(self, name: str, tensor: Tensor) -> None:
        self.edited[name] = tensor.detach()

    def changed(self, tensor: str) -> Tensor | None:
        """What passes made of a tensor of the checkpoint; None where it is as it was."""
        source = self.planned.source
        for parameter, parts in source.parts.items():
            for slot in parts.slots if parameter in self.edited else ():
                if source.tensor_of(slot) == tensor:
                    return slot.of(self.edited[parameter])
        found = (edited for name, edited in self.edited.items() if source.names.get(name) == tensor)
        return next(found, None)

    def rounded(self, name: str, tensor: Tensor) -> Tensor:
        source = self.planned.source
        if name in source.parts or any(job.slot.parameter == name for job in self.jobs.values()):
            return tensor
        return tensor.to(torch_dtype(source.entry(name).dtype)).to(tensor.dtype)

    def note(self, module: str, line: str) -> None:
        self.notes[module] = line
        self.progress.say(f"{re.sub(r'[.][0-9]+[.]', '.*.', module)}: {line}")

    def statistics(self, needs: Mapping[str, tuple[type[Statistic], ...]]) -> Mapping[str, Seen]:
        return {}

    def inputs(self) -> Tensor:
        raise RecipeError(f"{self.shard.name}: no text runs through it")

    def teacher(self) -> Tensor:
        return self.inputs()

    def forward(self, states: Tensor) -> Tensor:
        raise RecipeError(f"{self.shard.name}: no text runs through it")

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield self.inputs(), self.inputs()

    def store(self, job: Job, tensors: Mapping[str, Tensor], facts: Facts) -> None:
        """Keep a packed matrix, by the names its format gives the tensors, until it is written: by
        the first of several processes."""
        if not self.processes.leads:
            return
        shape = (job.slot.rows, job.slot.cols)
        stored = Stored.whole(job.format, {n: t.cpu() for n, t in tensors.items()}, shape)
        self.stored |= self.planned.plan.layout.write(job.slot.module, stored)
        self.modules[job.slot.module] = facts
        self.progress.step(self.planned.source.nbytes_of(job.slot), job.slot.module)


class BlockPart(StreamedPart):
    """A block in memory, or the head with the states after the last block."""

    def __init__(
        self,
        *streamed: Any,
        runner: BlockRunner,
        states: dict[str, Tensor],
        calibration: str,
        teacher: str,
        work: Path | None = None,
    ) -> None:
        super().__init__(*streamed)
        self.work = work
        self.runner, self.states = runner, states
        self._calibration, self._teacher = calibration, teacher
        self._before: Tensor | None = None
        self.moved = False
        self.carried: list[Tensor] = []
        self.carried_rows = torch.empty(0, dtype=torch.int64)

    @property
    def batch(self) -> int:
        return self.runner.batch

    @property
    def module(self) -> nn.Module:
        found: nn.Module = self.planned.skeleton.module(self.prefix)
        return found

    def weight(self, slot: Slot) -> Tensor:
        return slot.view(self.planned.skeleton.model)

    def slabs(self, slot: Slot, multiple: int) -> Iterator[tuple[int, Tensor]]:
        yield 0, self.weight(slot)

    def tensor(self, name: str) -> Tensor:
        place, _, leaf = name.rpartition(".")
        found: Tensor = getattr(self.planned.skeleton.module(place), leaf).data
        return found

    def replace(self, name: str, tensor: Tensor) -> None:
        held = self.tensor(name)
        super().replace(name, tensor.clone() if tensor.data_ptr() == held.data_ptr() else tensor)
        if held.shape == tensor.shape and held is not tensor:
            held.copy_(tensor)

    def statistics(
        self,
        needs: Mapping[str, tuple[type[Statistic], ...]],
        weights: Mapping[str, Tensor] | None = None,
    ) -> Mapping[str, Seen]:
        """Those of one model: nothing of what compares it with the original. `weights` of tokens
        as `Gatherer` takes them. Of several processes each has the sums over all."""
        mine = {name: asked for name, asked in needs.items() if self.runs(name)}
        gatherer = Gatherer(mine, weights)
        if not gatherer.needs:
            return {}
        states = self.states[self._calibration]
        if self.index == HEAD_BLOCK:
            self.runner.watch_head(states, gatherer.hook)
        else:
            assert self.index is not None
            self.runner.watch(self.index, states, gatherer.needs, gatherer.hook)
        return summed(gatherer.seen, gatherer.needs, self.device, self.processes)

    def runs(self, module: str) -> bool:
        """Whether it has inputs to see: it is a layer that runs, or an expert's matrix."""
        if self.index == HEAD_BLOCK:
            return module == self.prefix
        slot = self.planned.skeleton.slots.get(module)
        if slot is not None and slot.kind == "experts":
            return True
        inside = module.removeprefix(f"{self.prefix}.")
        return inside in (name for name, _ in self.module.named_modules())

    def inputs(self) -> Tensor:
        return self.states[self._calibration]

    def teacher(self) -> Tensor:
        return self.states[self._teacher]

    def before(self) -> Tensor | None:
        """What `inputs` are of in the original; None where it does not run beside the result."""
        if self.index == HEAD_BLOCK:
            return self.states.get(self._teacher)
        return self._before

    def teach(self) -> None:
        """Move the original's states through the part, while it still is the original's."""
        states = self.states.get(self._teacher)
        if states is not None and self.index is not None:
            self._before = states.clone()
            self.runner.run(self.index, states)

    def carry(self, states: Tensor, rows: Tensor) -> None:
        """While blocks are surveyed: have other outputs of the block [sequences, length, hidden],
        of the calibration sequences `rows`, go on to the KL that they end in."""
        self.carried.append(states)
        self.carried_rows = rows

    def forward(self, states: Tensor) -> Tensor:
        assert self.index is not None
        return self.runner.forward(self.index, states)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        assert self.index is not None
        self.moved = True
        for piece in self.inputs().split(self.runner.batch):
            before = piece.clone()
            self.runner.run(self.index, piece)
            yield before, piece
