"""What a conversion will take: disk, memory, time. Estimated from shapes, and from this machine's
speed measured for a fraction of a second."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from compress_methods.algorithms import Hessian
from compress_methods.calibration.self_generated import (
    CACHE_BYTES,
    FLOAT,
    RESIDENT_BYTES,
    batch_rows,
)
from compress_methods.conversion.part import Planned
from compress_methods.conversion.passes.allocation import CARRIED_BYTES, SEQUENCES, find_groups
from compress_methods.conversion.passes.experts import EXPERTS, most_gathered
from compress_methods.conversion.passes.weighing import DRAWS, groups_of
from compress_methods.conversion.planning.plan import Job, Plan
from compress_methods.conversion.stages import Stage
from compress_methods.errors import OutputError
from compress_methods.model.skeleton import Skeleton
from compress_methods.system.words import size_text
from compress_methods.transforms import Pass

BASE_BYTES = 400 * 2**20
RTN_BYTES_PER_SECOND = 70e6
STREAM_BYTES_PER_SECOND = 2.8e9
NARROW_MATMUL = 0.4


@dataclass(frozen=True)
class Estimate:
    """Bytes and seconds a conversion will need. `disk` is the peak in the output directory."""

    disk: int
    memory: int
    seconds: float


def estimate(plan: Plan, skeleton: Skeleton, calibrated: bool, sampled: bool = False) -> Estimate:
    """Peak disk, peak memory and rough time of a conversion.

    `sampled`: calibrated on text the model first writes itself. The rates are those of
    two cores with AVX2.
    """
    largest = max((j.slot.rows * j.slot.cols for j in plan.jobs), default=0)
    seconds = plan.original_bytes / RTN_BYTES_PER_SECOND
    memory = BASE_BYTES + plan.compressed_bytes // max(1, len(plan.shards)) + 2 * FLOAT * 2**23
    if calibrated:
        states = _states_bytes(plan, skeleton)
        block = max(sum(p.numel() for p in b.parameters()) for b in skeleton.blocks)
        columns = max(
            (j.slot.cols for j in plan.jobs if Hessian in j.algorithm.needs(j.format)), default=0
        )
        memory += states + 2 * FLOAT * block + 4 * FLOAT * columns**2 + 3 * FLOAT * largest
        if plan.needs_original:  # its matrices and states, what inputs have drifted by, the aim
            compared = max(_compared(shard.jobs) for shard in plan.shards)
            memory += states + FLOAT * compared + 2 * FLOAT * columns**2 + FLOAT * largest
        memory += max(most_gathered(shard.jobs) for shard in plan.shards)
        # Codes, momentum and gradient of a block that is trained.
        memory += 3 * FLOAT * _most_refined(plan)
        flops = flops_per_second()
        surveying, weighing = _surveying(plan, skeleton), _weighing(plan, skeleton)
        memory += surveying[0] + weighing.memory
        seconds += (_forward_flops(plan, skeleton) + surveying[1] + weighing.flops) / flops
        if sampled:
            sampling = _sampling(plan, skeleton, flops)
            memory, seconds = max(memory, sampling[0]), seconds + sampling[1]
    return Estimate(estimate_disk(plan, skeleton, calibrated), memory, seconds)


def _compared(jobs: Sequence[Job]) -> int:
    """Weights that are there twice while they are packed, as they are and as they were."""
    return sum(job.slot.rows * job.slot.cols for job in jobs if job.slot.kind != EXPERTS)


def _sampling(plan: Plan, skeleton: Skeleton, flops: float) -> tuple[int, float]:
    """Bytes and seconds for the model to write its own calibration text."""
    settings = plan.recipe.calibration
    blocks = [sum(p.numel() for p in block.parameters()) for block in skeleton.blocks]
    rows, cols = skeleton.module(skeleton.embedding).weight.shape
    batch = batch_rows(skeleton.model.config.get_text_config(), settings)
    steps = settings.length * math.ceil(settings.rows / batch)
    products = 2.0 * steps * batch * (sum(blocks) + rows * cols)
    seconds = products / (NARROW_MATMUL * flops)
    held = FLOAT * sum(blocks)
    if held > RESIDENT_BYTES:
        held = FLOAT * max(blocks)
        seconds += steps * plan.original_bytes / STREAM_BYTES_PER_SECOND
    return BASE_BYTES + FLOAT * rows * cols + held + CACHE_BYTES, seconds


def _forward_flops(plan: Plan, skeleton: Skeleton) -> float:
    settings = plan.recipe.calibration
    tokens = (settings.samples + settings.held_out) * settings.length
    # Comparing runs both blocks up to each input: about twice as far as once through all of it.
    forwards = 7.0 if plan.needs_original else 2.0
    total = 0.0
    inputs: set[tuple[str, int]] = set()
    for slot in skeleton.slots.values():
        if slot.kind == "blocks":
            total += 2.0 * forwards * tokens * slot.rows * slot.cols
    for job in plan.jobs:
        if Hessian in job.algorithm.needs(job.format):
            groups = groups_of(job)
            parent = job.slot.module if groups else job.slot.module.rpartition(".")[0]
            if (parent, job.slot.cols) not in inputs:
                inputs.add((parent, job.slot.cols))
                total += 2.0 * tokens * job.slot.cols**2 * max(1, groups)
            total += 2.0 * job.slot.rows * job.slot.cols**2
        if (refinement := job.algorithm.refinement) is not None:
            seen = refinement.iterations * refinement.batch * settings.length
            total += 6.0 * seen * job.slot.rows * job.slot.cols
    return total


def _most_refined(plan: Plan) -> int:
    """Weights of the block in which most are trained."""
    jobs = [[j for j in shard.jobs if j.algorithm.refinement is not None] for shard in plan.shards]
    return max((sum(j.slot.rows * j.slot.cols for j in mine) for mine in jobs), default=0)


def _surveying(plan: Plan, skeleton: Skeleton) -> tuple[int, float]:
    """Bytes and operations of trying every format that is open before the conversion."""
    groups = find_groups(plan, skeleton.architecture)
    if not groups:
        return 0, 0.0
    settings = plan.recipe.calibration
    tokens = min(settings.samples, SEQUENCES) * settings.length
    blocks = [sum(p.numel() for p in block.parameters()) for block in skeleton.blocks]
    total = _forward_flops(plan, skeleton) / 2
    for group in groups:
        total += 2.0 * tokens * blocks[group.block] * len(group.choices)
        if group.open:
            total += 2.0 * tokens * sum(blocks[group.block + 1 :])
        for job in group.jobs:
            if Hessian in job.algorithm.needs(job.format):
                total += 2.0 * job.slot.rows * job.slot.cols**2 * len(group.choices)
    hidden = skeleton.model.get_input_embeddings().weight.shape[1]
    one = sum(group.open for group in groups) * settings.length * hidden * FLOAT
    return max(one, min(one * tokens // settings.length, CARRIED_BYTES)), total


@dataclass(frozen=True)
class _Weighing:
    """What weighing tokens, and more Hessians by it, takes besides; flops of the pass alone."""

    disk: int = 0
    memory: int = 0
    flops: float = 0.0


def _weighing(plan: Plan, skeleton: Skeleton) -> _Weighing:
    """Of `passes/weighing.py`: the states at every block, the gradients that go backwards."""
    groups = {job.slot.module: found for job in plan.jobs if (found := groups_of(job))}
    if not groups:
        return _Weighing()
    settings = plan.recipe.calibration
    tokens = settings.samples * settings.length
    rows, hidden = skeleton.module(skeleton.embedding).weight.shape
    states, blocks = tokens * hidden * FLOAT, len(skeleton.blocks)
    weights = sum(p.numel() for block in skeleton.blocks for p in block.parameters())
    more = [
        FLOAT * (groups[job.slot.module] - 1) * job.slot.cols**2
        for job in plan.jobs
        if job.slot.module in groups
    ]
    # Compared matrices are solved one by one; else all of a block have their Hessians at once.
    held = 2 * max(more) if plan.needs_original else sum(more) // blocks
    logits = 4 * FLOAT * settings.length * rows
    return _Weighing(
        disk=(blocks + 2 + 2 * DRAWS) * states + FLOAT * tokens * sum(groups.values()),
        memory=held + max(DRAWS * states, logits),
        flops=2.0 * tokens * (weights * (2 + DRAWS) + rows * hidden * (1 + DRAWS)),
    )


def flops_per_second() -> float:
    """Of large products on this machine."""
    a = torch.rand(1024, 1024)
    a @ a
    began = time.perf_counter()
    for _ in range(3):
        a @ a
    return 3 * 2 * 1024**3 / (time.perf_counter() - began)


def require_room(needed: int, out: Path) -> None:
    """`OutputError` when the output's file system has less than `needed` bytes for what is not
    written yet, or the place can't be written."""
    place = existing_parent(out)
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise OutputError(f"{place}: cannot be written to")
    needed -= written(out)
    free = shutil.disk_usage(place).free
    if free < needed:
        raise OutputError(
            f"{place}: {size_text(free)} free, the conversion needs {size_text(needed)}"
        )


def existing_parent(out: Path) -> Path:
    """The output directory, or the nearest directory above it that exists."""
    place = out.absolute()
    while not place.exists():
        place = place.parent
    return place


def estimate_disk(plan: Plan, skeleton: Skeleton, calibrated: bool) -> int:
    """Bytes the output directory holds at its fullest."""
    if not calibrated:
        return plan.compressed_bytes
    states = _states_bytes(plan, skeleton) + _surveying(plan, skeleton)[0]
    # What a trained block goes on from: codes, momentum, which are settled; replaced when whole.
    training = 2 * (2 * FLOAT + 1) * _most_refined(plan)
    return plan.compressed_bytes + 2 * states + training + _weighing(plan, skeleton).disk


def stages_disk(stages: Sequence[Planned], calibrated: bool) -> int:
    """The same for several stages: each result lies there until the next one is finished."""
    earlier = [0, *(stage.plan.compressed_bytes for stage in stages[:-1])]
    return max(
        before + estimate_disk(stage.plan, stage.skeleton, calibrated)
        for before, stage in zip(earlier, stages, strict=True)
    )


def estimate_stages(stages: Sequence[Stage], calibrated: bool, sampled: bool) -> Estimate:
    """Peak disk, peak memory and rough time of all stages; the original writes the text once."""
    found = []
    for number, stage in enumerate(stages):
        planned = stage.planned
        cost = estimate(planned.plan, planned.skeleton, calibrated, sampled and number == 0)
        if any(type(visitor).visit is not Pass.visit for visitor in stage.passes):
            cost = _with_hessians(cost, planned)
        found.append(cost)
    return Estimate(
        stages_disk([stage.planned for stage in stages], calibrated),
        max(cost.memory for cost in found),
        sum(cost.seconds for cost in found),
    )


def _with_hessians(cost: Estimate, planned: Planned) -> Estimate:
    """What it takes besides to gather one Hessian per block and sweep its columns."""
    settings = planned.plan.recipe.calibration
    targets = planned.skeleton.slots.values()
    columns = max(slot.cols for slot in targets if slot.kind == "blocks")
    flops = 2.0 * len(planned.skeleton.blocks) * columns**2
    flops *= settings.samples * settings.length + columns
    return Estimate(
        cost.disk,
        cost.memory + 4 * FLOAT * columns**2,
        cost.seconds + flops / flops_per_second(),
    )


def _states_bytes(plan: Plan, skeleton: Skeleton) -> int:
    """Bytes of the activations between two blocks: calibration, held out twice, and the original's
    where it is compared with."""
    settings = plan.recipe.calibration
    hidden = skeleton.model.get_input_embeddings().weight.shape[1]
    samples = settings.samples * (2 if plan.needs_original else 1)
    return int((samples + 2 * settings.held_out) * settings.length * hidden * FLOAT)


def written(out: Path) -> int:
    """Bytes of files already there."""
    return sum(f.stat().st_size for f in out.rglob("*") if f.is_file()) if out.exists() else 0
