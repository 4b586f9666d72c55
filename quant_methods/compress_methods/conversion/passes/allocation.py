"""allocation: bytes divided among layers by what each loses.

    modules:
      - {match: blocks, format: s50, algorithm: alps, allocate: output_error}
      - {match: blocks, format: [w2, w3, w4, w8], algorithm: gptq}      # with budget: {bits: 3.5}

Before the conversion one more pass runs the calibration text through the original, block by block.
In each block every group of matrices that vLLM fuses (q/k/v, gate/up), alone, is put into each of
the formats it may have by the rule's algorithm, and how far that moves the block's output h is
noted: ||h' - h||^2 / ||h||^2, the mean over tokens of `SEQUENCES` sequences from the whole text.
(Errors of each matrix's own output do not compare: on novels-8m, dividing by those lost half as
much again as dividing nothing.) Then each group gets a format so that the sum of what is lost is
least in the bytes there are; see `recipe/knapsack.py`.

`allocate` chooses n of a sparse format, at several n around its own, in no more bytes than with
that n everywhere; values are measured as they are, before rounding. Never a larger sum of errors
than the same n, which is kept where nothing is better.

A list of formats is measured with its rounding, and what a block's drift does to the model counts:
of every group one choice (of four the second smallest) is `carried` on through all later blocks, in
a few sequences, to the KL of the model's predictions. Its ratio to the drift there turns the drifts
of the group's other choices into KL. KLs are taken to add up.

Statistics are plain ones: an algorithm's `loss_groups` count in the conversion alone.

The pass takes as long as several conversions, one per choice; carrying adds, for every group of the
model, a few sequences through the blocks behind it. Fails where errors of layers do not add up to
what the model loses (far beyond a KL of .1): measure the result.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from copy import copy
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from compress_methods.algorithms import Seen
from compress_methods.checkpoint.loading.model import quantize_inputs
from compress_methods.conversion.part import BlockPart
from compress_methods.conversion.passes.experts import fed
from compress_methods.conversion.passes.packing import Packing, solve_in_slabs
from compress_methods.conversion.planning.candidates import group_of_module
from compress_methods.conversion.planning.plan import Job, Plan
from compress_methods.errors import CalibrationError
from compress_methods.formats import Format
from compress_methods.model.architecture import Architecture
from compress_methods.recipe import knapsack
from compress_methods.transforms import Part

SEQUENCES = 16
CARRIED_BYTES = 2**30
"""Of all states that are carried at once, where one sequence of each is not more."""
FLOAT = 4
TINY = 1e-30


@dataclass(frozen=True)
class Group:
    """Matrices that share one format: jobs of one block, formats to choose from, the planned one
    among them, and the bytes all of them take in each."""

    block: int
    jobs: tuple[Job, ...]
    choices: tuple[Format, ...]
    name: str = ""

    @property
    def uniform(self) -> int:
        return self.choices.index(self.jobs[0].format)

    @property
    def sizes(self) -> list[int]:
        return [sum(job.nbytes(fmt) for job in self.jobs) for fmt in self.choices]

    @property
    def open(self) -> bool:
        """Whether a budget decides; else the bytes of the planned formats are divided."""
        return self.jobs[0].open

    @property
    def middle(self) -> int:
        """The one that is carried: where the smallest are, most is decided."""
        return (len(self.choices) - 1) // 2


def find_groups(plan: Plan, architecture: Architecture, least: int = 2) -> list[Group]:
    """What is chosen together, in order; those with `least` choices or more."""
    found: dict[str, list[Job]] = {}
    blocks: dict[str, int] = {}
    for shard in plan.shards:
        for job in shard.jobs:
            if job.choices and shard.block is not None and shard.block >= 0:
                name = group_of_module(job.slot.module, architecture)
                found.setdefault(name, []).append(job)
                blocks[name] = shard.block
    groups = []
    for name, jobs in found.items():
        shared = [fmt for fmt in jobs[0].choices if all(fmt in job.choices for job in jobs)]
        if len(shared) >= least:
            groups.append(Group(blocks[name], tuple(jobs), tuple(shared), name))
    return groups


def choose(errors: Sequence[Sequence[float]], groups: Sequence[Group]) -> list[int]:
    """Index of the choice of every group: least sum of errors in the bytes of the uniform ones."""
    sizes = [group.sizes for group in groups]
    uniform = [group.uniform for group in groups]
    budget = sum(s[u] for s, u in zip(sizes, uniform, strict=True))
    chosen = knapsack.greedy(errors, sizes, budget)
    better = knapsack.total(errors, chosen) < knapsack.total(errors, uniform)
    return chosen if better else uniform


@dataclass(frozen=True)
class Measured:
    """What was found of a group's choices: how far each moves the block's output, and the KL that
    follows, where the group was carried to the end; else the same as `drifts`."""

    drifts: tuple[float, ...]
    losses: tuple[float, ...]


@dataclass(frozen=True)
class AllocatedPacking(Packing):
    """A packing whose formats are chosen before it starts, from what each choice does alone.

    `allowed`: bytes that the groups a budget decides on may take together.
    """

    groups: tuple[Group, ...] = ()
    allowed: int | None = None
    formats: dict[str, Format] = field(default_factory=dict, compare=False)
    measured: tuple[Measured, ...] = field(default=(), compare=False)
    looks_ahead: ClassVar[bool] = True

    def survey(self, part: Part) -> list[float]:
        """Errors of every group of the block under each of its choices."""
        assert isinstance(part, BlockPart)
        mine = [group for group in self.groups if group.block == part.index]
        jobs = [job for group in mine for job in group.jobs]
        needs = {
            job.slot.module: tuple(
                dict.fromkeys(s for fmt in job.choices for s in job.algorithm.needs(fmt))
            )
            for job in jobs
        }
        seen = dict(part.statistics(needs))
        seen |= fed(part, needs, seen)[0]
        missing = [name for name, asked in needs.items() if asked and name not in seen]
        if missing:
            raise CalibrationError(f"{missing[0]}: never ran during calibration; leave it out")
        inputs = spread(part.inputs())
        expected = outputs(part, inputs)
        carried = self._carried(part.inputs())
        found: list[float] = []
        for group in mine:
            kept = [part.weight(job.slot).clone() for job in group.jobs]
            for index, fmt in enumerate(group.choices):
                with ExitStack() as stack:
                    _fill(part, group, fmt, seen, kept, stack)
                    moved = outputs(part, inputs)
                found.append(_moved(moved, expected))
                if group.open and index == group.middle:
                    part.carry(moved[:: len(moved) // len(carried)][: len(carried)], carried)
            for job, weight in zip(group.jobs, kept, strict=True):
                part.weight(job.slot).copy_(weight)
        return found

    def _carried(self, inputs: Tensor) -> Tensor:
        """Which of all sequences are carried: as many of those measured as memory allows."""
        rows = spread(torch.arange(len(inputs)))
        size = FLOAT * inputs[0].numel() * sum(group.open for group in self.groups)
        most = max(1, min(len(rows), CARRIED_BYTES // max(1, size)))
        return rows[:: len(rows) // most][:most]

    def decide(self, surveyed: Sequence[Sequence[float]]) -> AllocatedPacking:
        """Choose; a row has the drifts of the block's groups, then the KL of those carried."""
        rows = [list(row) for row in surveyed]
        drifts = [[rows[group.block].pop(0) for _ in group.choices] for group in self.groups]
        losses = [
            _losses(row, group.middle, rows[group.block].pop(0)) if group.open else row
            for row, group in zip(drifts, self.groups, strict=True)
        ]
        formats: dict[str, Format] = {}
        for is_open in (False, True):
            mine = [i for i, group in enumerate(self.groups) if group.open == is_open]
            if not mine or (is_open and self.allowed is None):
                continue
            groups, errors = [self.groups[i] for i in mine], [losses[i] for i in mine]
            if is_open:
                assert self.allowed is not None
                chosen = knapsack.exact(errors, [group.sizes for group in groups], self.allowed)
            else:
                chosen = choose(errors, groups)
            for group, index in zip(groups, chosen, strict=True):
                formats |= {job.slot.module: group.choices[index] for job in group.jobs}
        measured = tuple(
            Measured(tuple(row), tuple(lost)) for row, lost in zip(drifts, losses, strict=True)
        )
        decided = copy(self)
        object.__setattr__(decided, "formats", formats)
        object.__setattr__(decided, "measured", measured)
        return decided

    def facts(self) -> dict[str, Any]:
        """What a budget was spent by, for the report; nothing where there was none."""
        lost = [
            measured.losses[group.choices.index(self.formats[group.jobs[0].slot.module])]
            for group, measured in zip(self.groups, self.measured, strict=True)
            if group.open and self.formats
        ]
        if not lost:
            return {}
        return {"budget": {"allowed_bytes": self.allowed, "predicted_kl": sum(lost)}}


def _losses(drifts: Sequence[float], middle: int, kl: float) -> list[float]:
    """KL of every choice, as far as it grows with the drift."""
    return [drift * kl / max(drifts[middle], TINY) for drift in drifts]


def _fill(
    part: BlockPart,
    group: Group,
    fmt: Format,
    seen: Mapping[str, Seen],
    weights: Sequence[Tensor],
    stack: ExitStack,
) -> None:
    """Put a group's matrices in one format, from `weights`, into the model; `stack` undoes what
    they then do to their inputs. Where n is allocated, values are as they were."""
    held = fmt if group.open else fmt.unrounded()
    shared: dict[tuple[Any, ...], Any] = {}
    for job, weight in zip(group.jobs, weights, strict=True):
        mine = seen.get(job.slot.module, {})
        key = (*map(id, mine.values()), job.algorithm)
        if key not in shared:
            shared = {key: job.algorithm.ready(mine, held)}
        if group.open:
            rows = [(weight.float(), shared[key])]
            tensors = solve_in_slabs(job.algorithm, held, weight.shape, rows)
            values = held.unpack(tensors)
            if not job.slot.index:
                module = part.planned.skeleton.module(job.slot.module)
                stack.callback(quantize_inputs(module, held).remove)
        else:
            solution = job.algorithm.fill(weight.float().contiguous(), shared[key], held)
            values = held.matrix(solution)
        part.weight(job.slot).copy_(values)


@torch.no_grad()
def outputs(part: BlockPart, inputs: Tensor) -> Tensor:
    """What the block makes of hidden states [sequences, length, hidden]."""
    pieces = [part.forward(piece).float().cpu() for piece in inputs.split(part.runner.batch)]
    return torch.cat(pieces)


def spread(inputs: Tensor) -> Tensor:
    """At most `SEQUENCES` of [sequences, length, hidden], from the whole text: neighbours are of
    one document, and how many make a batch is the device's matter."""
    return inputs[:: math.ceil(len(inputs) / SEQUENCES)]


def _moved(found: Tensor, expected: Tensor) -> float:
    """Mean over tokens of ||found - expected||^2 / ||expected||^2."""
    moved = (found - expected).square().sum(-1) / expected.square().sum(-1).clamp(min=TINY)
    return float(moved.mean(dtype=torch.float64))
