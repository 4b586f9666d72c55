"""packing: every matrix of a part solved by its algorithm and packed in its format.

Without text: matrix by matrix, slab of rows by slab. With text: statistics of the inputs of all
matrices that need some, then each is solved; its values take the weight's place in memory, so that
what follows is calibrated on what the result computes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

import compress_methods.kernels  # noqa: F401  (brings encoders that formats call)
from compress_methods.algorithms import Algorithm, Seen
from compress_methods.algorithms.statistics import (
    by_rows,
    compares,
    let_go_of_comparisons,
    relative_error,
)
from compress_methods.checkpoint.loading.model import quantize_expert_inputs, quantize_inputs
from compress_methods.conversion.part import BlockPart, Facts, StreamedPart
from compress_methods.conversion.passes.comparing import Comparer, Needs
from compress_methods.conversion.passes.dealing import Solution, solutions
from compress_methods.conversion.passes.experts import EXPERTS, fed, rounds
from compress_methods.conversion.passes.refining import SAVED, Solved, refine_block
from compress_methods.conversion.passes.repacking import repack
from compress_methods.conversion.passes.weighing import groups_of, loss_weights
from compress_methods.conversion.planning.plan import Job
from compress_methods.errors import CalibrationError
from compress_methods.formats import Format
from compress_methods.transforms import Part, Pass

SOLVE_ELEMENTS = 2**25


@dataclass(frozen=True)
class Packing(Pass):
    """The jobs are those of the part's shard."""

    name: ClassVar[str] = "packing"

    def visit(self, part: Part) -> None:
        assert isinstance(part, StreamedPart)
        if isinstance(part, BlockPart):
            pack_loaded(part)
        else:
            for job in part.shard.jobs:
                if job.algorithm.copies:
                    repack(part, job)
            pack_streamed(part, [job for job in part.shard.jobs if not job.algorithm.copies])


def pack_loaded(part: BlockPart) -> None:
    """Solve every matrix of a materialized part and put its values in the model.

    Where the original is compared with, matrices are solved in the order they run in, so that each
    makes up for what those before it have lost. Else all see the part as it was.
    """
    for job in part.shard.jobs:
        if job.algorithm.copies:  # the values in the model are those that are stored
            repack(part, job)
            if job.slot.module != part.skeleton.head and not job.slot.index:
                quantize_inputs(part.skeleton.module(job.slot.module), job.format)
    solved_here = [job for job in part.shard.jobs if not job.algorithm.copies]
    experts = [job for job in solved_here if job.slot.kind == EXPERTS]
    jobs = [job for job in solved_here if job.slot.kind != EXPERTS]
    needs = _needs(jobs)
    weights = loss_weights(part)
    if part.before() is None or not any(map(compares, needs.values())):
        solved = _pack_seen(part, jobs, part.statistics(needs, weights))
    else:
        solved = _pack_compared(part, jobs, needs, weights)
    for together in rounds(experts):
        solved += _pack_experts(part, together)
    formats = {job.slot.module: job.format for job in experts}
    quantize_expert_inputs(part.skeleton, [job.slot for job in experts], formats.get)
    _refine(part, solved)


def _pack_experts(part: BlockPart, jobs: Sequence[Job]) -> list[Solved]:
    """Solve a round of experts; its statistics are gone before the next one gathers its own."""
    needs = _needs(jobs)
    seen, tokens = fed(part, needs, part.statistics(needs))
    return _pack_seen(part, jobs, seen, tokens)


def _needs(jobs: Iterable[Job]) -> Needs:
    """The statistics that each matrix is solved from."""
    return {job.slot.module: job.algorithm.needs(job.format) for job in jobs}


def _pack_compared(
    part: BlockPart, jobs: Sequence[Job], needs: Needs, weights: Mapping[str, Tensor]
) -> list[Solved]:
    """Solve matrices in the order they run in, the original beside them."""
    comparer = Comparer(part, needs, weights)
    waiting = {job.slot.module: job for job in jobs}
    asked = [name for name in needs if needs[name] and part.runs(name)]
    solved: list[Solved] = []
    groups = comparer.look(asked)
    while groups:
        names = groups.pop(0)
        seen = comparer.statistics({name: needs[name] for name in names})
        if not groups:  # the widest matrices come last, and memory is short then
            del comparer
        solved += _pack_seen(part, [waiting.pop(name) for name in names], seen)
    return solved + _pack_seen(part, list(waiting.values()), {})


def _pack_seen(
    part: BlockPart,
    jobs: Sequence[Job],
    seen: Mapping[str, Seen],
    tokens: Mapping[str, int] | None = None,
) -> list[Solved]:
    """Solve some matrices from the statistics of their inputs; returns those to be refined, whose
    values are not final. `tokens`: how many came to matrices that not all come to."""
    shared: dict[tuple[Any, ...], Any] = {}

    def solve(job: Job) -> Solution:
        module = job.slot.module
        if job.algorithm.needs(job.format) and module not in seen:
            raise CalibrationError(f"{module}: never ran during calibration; leave it out")
        return _solve_seen(part, job, part.weight(job.slot).float(), seen.get(module, {}), shared)

    solved: list[Solved] = []
    for job, found in solutions(jobs, seen, solve, part.device, part.processes):
        slot, tensors = job.slot, found.tensors
        if job.algorithm.refinement is not None:
            assert found.aim is not None
            relaxed = job.format.relax(job.format.solution(tensors), found.aim)
            solved.append(Solved(job, tensors, relaxed))
        else:
            came = {} if not tokens else {"tokens": tokens[slot.module]}
            part.store(job, tensors, {**found.facts, **came})
        part.weight(slot).copy_(job.format.unpack(tensors))
        if slot.module != part.planned.skeleton.head and not slot.index:
            quantize_inputs(part.planned.skeleton.module(slot.module), job.format)
    return solved


def _solve_seen(
    part: BlockPart, job: Job, weight: Tensor, seen: Seen, shared: dict[tuple[Any, ...], Any]
) -> Solution:
    """What becomes of a matrix. What is prepared of the last statistics stays in `shared`."""
    algorithm, fmt = job.algorithm, job.format
    groups = by_rows(seen)
    let_go_of_comparisons(seen)
    aims: list[Tensor] = []

    def aimed() -> Iterator[tuple[Tensor, Any]]:
        for rows, mine in zip(weight.chunk(len(groups)), groups, strict=True):
            missing = algorithm.missed_by(rows, mine, fmt)
            let_go_of_comparisons(mine)
            key = (*map(id, mine.values()), algorithm, fmt)
            if key not in shared:
                shared.clear()
                shared[key] = algorithm.ready(mine, fmt)
            aims.append(algorithm.target_of(rows, shared[key], missing, fmt))
            del missing
            yield aims[-1], shared[key]

    tensors = solve_in_slabs(algorithm, fmt, weight.shape, aimed())
    aim = aims[0] if len(aims) == 1 else torch.cat(aims)
    values = fmt.unpack(tensors)
    output = relative_error(aim, values, seen) if seen else None
    facts = _facts(part, job, relative_error(weight, values), output, count_zeros(values))
    return Solution(tensors, facts, aim)


def _refine(part: BlockPart, solved: Sequence[Solved]) -> None:
    """Train solved matrices together, those of the same settings, and store them."""
    for settings in dict.fromkeys(found.job.algorithm.refinement for found in solved):
        assert settings is not None
        together = [found for found in solved if found.job.algorithm.refinement == settings]
        refined, facts = refine_block(part, together, settings, part.work and part.work / SAVED)
        for found, tensors in zip(together, refined, strict=True):
            values = found.job.format.unpack(tensors)
            error = relative_error(part.original(found.job.slot), values)
            zeros = count_zeros(values)
            part.store(found.job, tensors, _facts(part, found.job, error, None, zeros))
        name = part.prefix if not part.refined else f"{part.prefix} ({len(part.refined) + 1})"
        part.refined[name] = facts


def pack_streamed(part: StreamedPart, jobs: Sequence[Job]) -> None:
    """Solve matrices without calibration."""

    def solve(job: Job) -> Solution:
        return _solve_streamed(part, job)

    for job, found in solutions(jobs, {}, solve, part.device, part.processes):
        part.store(job, found.tensors, found.facts)


def _solve_streamed(part: StreamedPart, job: Job) -> Solution:
    """What becomes of a matrix, a slab of rows at a time where that is possible."""
    slot, fmt = job.slot, job.format
    prepared = job.algorithm.ready({}, fmt)
    specs = fmt.tensors(slot.rows, slot.cols)
    sliceable = job.algorithm.row_independent and all(s.rows_axis for s in specs.values())
    if not (slot.is_plain and sliceable):
        weight = part.weight(slot)
        tensors = solve_in_slabs(job.algorithm, fmt, weight.shape, [(weight, prepared)])
        values = fmt.unpack(tensors)
        error = relative_error(weight, values)
        return Solution(tensors, _facts(part, job, error, None, count_zeros(values)))
    stored = {name: spec.empty() for name, spec in specs.items()}
    error, energy, zeros = 0.0, 0.0, [0, 0]
    for first, slab in part.slabs(slot, fmt.alignment(slot.rows, slot.cols)[0]):
        weight = slab.float()
        packed = fmt.pack(job.algorithm.fill(weight, prepared, fmt))
        _place(fmt, packed, stored, (slot.rows, slot.cols), (first, first + len(slab)))
        here = float(torch.linalg.vecdot(weight, weight).sum(dtype=torch.float64))
        values = fmt.unpack(packed)[: len(slab)]
        error += relative_error(weight, values) * here
        energy += here
        zeros = [a + b for a, b in zip(zeros, count_zeros(values), strict=True)]
    return Solution(stored, _facts(part, job, error / max(energy, 1e-30), None, zeros))


def solve_in_slabs(
    algorithm: Algorithm, fmt: Format, shape: Sequence[int], groups: Iterable[tuple[Tensor, Any]]
) -> dict[str, Tensor]:
    """`fmt`'s tensors of a matrix of that shape, as many rows at a time as memory allows. `groups`:
    neighbouring rows [n, cols] in order, each with what is prepared for them."""
    rows, cols = shape
    aligned = fmt.alignment(rows, cols)[0]
    step = rows
    if algorithm.row_independent:
        step = max(aligned, SOLVE_ELEMENTS // cols // aligned * aligned)
    specs = fmt.tensors(rows, cols)
    whole = step >= rows or not all(spec.rows_axis for spec in specs.values())
    stored: dict[str, Tensor] = {}
    first = 0
    for weight, prepared in groups:
        if whole and len(weight) == rows:
            return fmt.pack(algorithm.fill(weight.contiguous(), prepared, fmt))
        stored = stored or {n: s.empty().to(weight.device) for n, s in specs.items()}
        for slab in weight.split(step):
            packed = fmt.pack(algorithm.fill(slab.contiguous(), prepared, fmt))
            _place(fmt, packed, stored, (rows, cols), (first, first + len(slab)))
            first += len(slab)
    return stored


def _place(
    fmt: Format,
    packed: Mapping[str, Tensor],
    stored: Mapping[str, Tensor],
    shape: tuple[int, int],
    rows: tuple[int, int],
) -> None:
    """Copy the stored tensors of a slab of rows to where they lie in those of the whole matrix."""
    for name, window in fmt.slice(stored, shape, rows=rows).items():
        window.copy_(packed[name])


def _facts(
    part: StreamedPart,
    job: Job,
    weight_error: float,
    output_error: float | None,
    zeros: Sequence[int],
) -> Facts:
    """What the report says of a matrix; `zeros` as `count_zeros` gives them."""
    slot = job.slot
    specs = job.format.tensors(slot.rows, slot.cols)
    groups = groups_of(job)
    return {
        "format": job.format.describe(),
        "algorithm": job.algorithm.name,
        **({"loss_groups": groups} if groups else {}),
        "shape": [slot.rows, slot.cols],
        "bytes_before": part.planned.source.nbytes_of(slot),
        "bytes_after": sum(spec.nbytes for spec in specs.values()),
        "weight_error": weight_error,
        "output_error": output_error,
        "zeros": zeros[0] / (slot.rows * slot.cols),
        "zero_rows": zeros[1],
    }


def count_zeros(values: Tensor) -> tuple[int, int]:
    """Zeros in a matrix, and rows of nothing else."""
    zero = values == 0
    return int(zero.sum()), int(zero.all(1).sum())
