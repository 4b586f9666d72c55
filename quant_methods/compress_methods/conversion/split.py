"""split: the bytes of a uniform sparsity, divided among layers by what each loses.

    modules:
      - {match: blocks, format: s50, algorithm: alps, split: error}

Before the conversion one more pass runs the calibration text through the original, block by block.
In each block the rule's algorithm prunes every matrix at several n around the format's own, alone,
and how far that moves the block's output h is noted: ||h' - h||^2 / ||h||^2, the mean over tokens.
(Errors of each matrix's own output do not compare: on novels-8m, dividing by those lost half as
much again as dividing nothing.) Matrices that vLLM fuses share one n and are pruned together. Then
n is chosen for each so that the sum of those errors is least and all together take no more bytes
than with the format's n everywhere: start with the least n, and buy the most error per byte
(steepest edge of each lower convex hull) until nothing more fits; exact but for the last step
(Everett, 1963). Never a larger sum than the uniform one, which is kept where nothing is better.

The pass takes as long as several conversions, one per n. Values are measured as they are, before
rounding. Fails where layer errors do not add up to what the model loses: measure the result.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress_methods.algorithms.base import Gathered
from compress_methods.conversion.blocks import BlockRunner
from compress_methods.conversion.journal import Journal
from compress_methods.conversion.plan import Job, Plan, fused_group
from compress_methods.conversion.run import Opened, Run
from compress_methods.conversion.units import CALIBRATION
from compress_methods.errors import CalibrationError
from compress_methods.formats.dense import Dense
from compress_methods.formats.sparse import Sparse
from compress_methods.progress import Progress
from compress_methods.safetensors_io import read_tensors, write_tensors

ERRORS, MEASURED = "errors", "split.safetensors"
TINY = 1e-30
ROUNDING = 1e-9
PLAIN = Dense("float32")


@dataclass(frozen=True)
class Group:
    """Matrices that share one n: jobs of one block, formats to choose from, the recipe's own one
    among them, and the bytes all of them take in each."""

    block: int
    jobs: tuple[Job, ...]
    choices: tuple[Sparse, ...]

    @property
    def uniform(self) -> int:
        return self.choices.index(self.jobs[0].format)

    @property
    def sizes(self) -> list[int]:
        return [
            sum(fmt.nbytes(job.target.rows, job.target.cols) for job in self.jobs)
            for fmt in self.choices
        ]


def find_groups(plan: Plan) -> list[Group]:
    """What is chosen together, in order; groups without a choice are not among them."""
    found: dict[str, list[Job]] = {}
    for unit in plan.units:
        for job in unit.jobs:
            if job.choices and unit.block is not None and unit.block >= 0:
                found.setdefault(fused_group(job.target.module), []).append(job)
    blocks = {job.target.module: unit.block for unit in plan.units for job in unit.jobs}
    groups = []
    for jobs in found.values():
        shared = [fmt for fmt in jobs[0].choices if all(fmt in job.choices for job in jobs)]
        if len(shared) > 1:
            block = blocks[jobs[0].target.module]
            groups.append(Group(block or 0, tuple(jobs), tuple(shared)))
    return groups


def choose(errors: Sequence[Sequence[float]], groups: Sequence[Group]) -> list[int]:
    """Index of the choice of every group: least sum of errors in the bytes of the uniform ones."""
    sizes = [group.sizes for group in groups]
    uniform = [group.uniform for group in groups]
    left = sum(s[u] - s[0] for s, u in zip(sizes, uniform, strict=True))
    chosen = [0] * len(groups)
    edges = sorted(
        (edge, group)
        for group, (e, s) in enumerate(zip(errors, sizes, strict=True))
        for edge in _edges(e, s)
    )
    closed = set()
    for (_, _, end), group in edges:
        cost = sizes[group][end] - sizes[group][chosen[group]]
        if group not in closed and cost <= left:
            chosen[group], left = end, left - cost
        else:
            closed.add(group)

    def total(picked: Sequence[int]) -> float:
        return sum(e[i] for e, i in zip(errors, picked, strict=True))

    return chosen if total(chosen) < total(uniform) else uniform


def _edges(errors: Sequence[float], sizes: Sequence[int]) -> Iterator[tuple[float, int, int]]:
    """(slope, start, end) of the lower convex hull of error over bytes, steepest first.

    Choices on one line, but for rounding, are edges of their own: a whole line may not fit.
    """
    start, last = 0, -math.inf
    while start < len(sizes) - 1:
        slopes = [
            ((errors[end] - errors[start]) / (sizes[end] - sizes[start]), end)
            for end in range(start + 1, len(sizes))
        ]
        steepest = min(slopes)[0]
        if steepest >= 0:
            return
        end = next(end for slope, end in slopes if slope <= steepest * (1 - ROUNDING))
        last = max(last, steepest)
        yield last, start, end
        start = end


class Split(Run):
    """A packing whose formats are chosen before it starts; `job.plan` is then the chosen one."""

    def execute(self, journal: Journal) -> None:
        self.journal = journal
        plan = self.job.plan
        groups = find_groups(plan)
        path = journal.work / MEASURED
        if not path.exists():
            write_tensors(path, {ERRORS: self._measure(groups)})
            journal.drop_states(len(self.job.skeleton.blocks) + 1)
        errors = read_tensors(path)[ERRORS].tolist()
        chosen = choose([e[: len(g.choices)] for e, g in zip(errors, groups, strict=True)], groups)
        formats = {
            job.target.module: group.choices[index]
            for group, index in zip(groups, chosen, strict=True)
            for job in group.jobs
        }
        self.job = dataclasses.replace(self.job, plan=with_formats(plan, formats))
        super().execute(journal)

    def _measure(self, groups: list[Group]) -> Tensor:
        """Errors [groups, most choices] of every group under each of its choices."""
        packing, skeleton = self.job, self.job.skeleton
        bare = [dataclasses.replace(unit, jobs=()) for unit in packing.plan.units]
        plan = dataclasses.replace(packing.plan, units=tuple(bare))
        first, count = self.journal.saved_index() or 0, len(skeleton.blocks)
        self.job = Opened(skeleton, packing.source, plan)
        label = self.label + ", measuring layers"
        with Progress(count, label, done=first, quiet=self.quiet) as progress:
            runner = self.block_runner()
            converter = self.converter(progress)
            states = self.states(converter, runner, first, (CALIBRATION,))
            width = max((len(group.choices) for group in groups), default=1)
            shape = (len(groups), width)
            errors = states.setdefault(ERRORS, torch.zeros(shape, dtype=torch.float64))
            for index in range(first, count):
                prefix = f"{skeleton.blocks_name}.{index}"
                runner.load(converter.parameters(prefix))
                mine = {i: group for i, group in enumerate(groups) if group.block == index}
                for i, found in self._measure_block(runner, index, states, mine):
                    errors[i, : len(found)] = torch.tensor(found, dtype=torch.float64)
                runner.run(index, states[CALIBRATION])
                runner.unload(prefix)
                self.journal.save_states(index + 1, states)
                self.journal.drop_states(index + 1)
                progress.step(1, f"layer {index}")
        self.job = packing
        return errors

    def _measure_block(
        self, runner: BlockRunner, index: int, states: dict[str, Tensor], groups: dict[int, Group]
    ) -> Iterator[tuple[int, list[float]]]:
        needs = {
            job.target.module: job.algorithm.needs
            for group in groups.values()
            for job in group.jobs
        }
        of_module = {
            name: gathered
            for names, gathered in runner.gather(index, states[CALIBRATION], needs)
            for name in names
        }
        inputs = states[CALIBRATION][: runner.batch]
        expected = _outputs(runner, index, inputs)
        for i, group in groups.items():
            missing = [j.target.module for j in group.jobs if j.target.module not in of_module]
            if missing:
                raise CalibrationError(f"{missing[0]}: never ran during calibration; leave it out")
            modules = [self.job.skeleton.module(job.target.module) for job in group.jobs]
            kept = [module.weight.data.clone() for module in modules]
            errors = []
            for fmt in group.choices:
                self._prune(group, fmt, of_module, kept)
                errors.append(_moved(_outputs(runner, index, inputs), expected))
            for module, weight in zip(modules, kept, strict=True):
                module.weight.data.copy_(weight)
            yield i, errors

    def _prune(
        self, group: Group, fmt: Sparse, of_module: dict[str, Gathered], weights: list[Tensor]
    ) -> None:
        """Put a group's matrices, pruned from `weights` to one n, into the model."""
        plain = dataclasses.replace(fmt, values=PLAIN)
        prepared: tuple[Gathered, Any] = (None, None)
        for job, weight in zip(group.jobs, weights, strict=True):
            gathered = of_module[job.target.module]
            if prepared[0] is not gathered:
                prepared = (gathered, job.algorithm.prepare(gathered, plain))
            transposed = job.target.transposed
            matrix = (weight.T if transposed else weight).contiguous()
            solution = job.algorithm.solve(matrix, prepared[1], plain)
            values = plain.expand(solution.values, solution.mask)
            module = self.job.skeleton.module(job.target.module)
            module.weight.data.copy_(values.T if transposed else values)


def _outputs(runner: BlockRunner, index: int, inputs: Tensor) -> Tensor:
    """What block `index` makes of hidden states [sequences, length, hidden]."""
    states = inputs.clone()
    runner.run(index, states)
    return states


def _moved(found: Tensor, expected: Tensor) -> float:
    """Mean over tokens of ||found - expected||^2 / ||expected||^2."""
    moved = (found - expected).square().sum(-1) / expected.square().sum(-1).clamp(min=TINY)
    return float(moved.mean(dtype=torch.float64))


def with_formats(plan: Plan, formats: dict[str, Sparse]) -> Plan:
    """The plan with other formats for some modules; what differs from the recipe's is named after
    it and n, such as `s50-n48`."""

    def changed(job: Job) -> Job:
        fmt = formats.get(job.target.module, job.format)
        if fmt == job.format:
            return job
        assert isinstance(fmt, Sparse)
        return dataclasses.replace(job, format=fmt, format_name=f"{job.format_name}-n{fmt.n}")

    units = tuple(
        dataclasses.replace(unit, jobs=tuple(changed(job) for job in unit.jobs))
        for unit in plan.units
    )
    before = sum(spec.nbytes for job in plan.jobs for spec in job.specs.values())
    after = sum(spec.nbytes for unit in units for job in unit.jobs for spec in job.specs.values())
    size = plan.compressed_bytes - before + after
    return dataclasses.replace(plan, units=units, compressed_bytes=size)
