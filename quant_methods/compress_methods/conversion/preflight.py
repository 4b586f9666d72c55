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

from compress_methods.conversion.plan import Plan
from compress_methods.conversion.run import Opened
from compress_methods.conversion.sampling import CACHE_BYTES, FLOAT, RESIDENT_BYTES, batch_rows
from compress_methods.conversion.stages import Stage
from compress_methods.errors import OutputError
from compress_methods.skeleton import Skeleton

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
    largest = max((j.target.rows * j.target.cols for j in plan.jobs), default=0)
    seconds = plan.original_bytes / RTN_BYTES_PER_SECOND
    memory = BASE_BYTES + plan.compressed_bytes // max(1, len(plan.units)) + 2 * FLOAT * 2**23
    if calibrated:
        states = _states_bytes(plan, skeleton)
        block = max(sum(p.numel() for p in b.parameters()) for b in skeleton.blocks)
        columns = max(
            (j.target.cols for j in plan.jobs if j.algorithm.needs == "hessian"), default=0
        )
        memory += states + 2 * FLOAT * block + 4 * FLOAT * columns**2 + 3 * FLOAT * largest
        flops = _flops_per_second()
        seconds += _forward_flops(plan, skeleton) / flops
        if sampled:
            sampling = _sampling(plan, skeleton, flops)
            memory, seconds = max(memory, sampling[0]), seconds + sampling[1]
    return Estimate(estimate_disk(plan, skeleton, calibrated), memory, seconds)


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
    total = 0.0
    inputs: set[tuple[str, int]] = set()
    for target in skeleton.targets.values():
        if target.kind == "blocks":
            total += 4.0 * tokens * target.rows * target.cols
    for job in plan.jobs:
        if job.algorithm.needs == "hessian":
            parent = job.target.module.rpartition(".")[0]
            if (parent, job.target.cols) not in inputs:
                inputs.add((parent, job.target.cols))
                total += 2.0 * tokens * job.target.cols**2
            total += 2.0 * job.target.rows * job.target.cols**2
    return total


def _flops_per_second() -> float:
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
            f"{place}: {free / 2**20:.0f} MiB free, the conversion needs {needed / 2**20:.0f} MiB"
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
    return plan.compressed_bytes + 2 * _states_bytes(plan, skeleton)


def stages_disk(stages: Sequence[Opened], calibrated: bool) -> int:
    """The same for a chain: every stage's result lies there until the next one's is finished."""
    earlier = [0, *(stage.plan.compressed_bytes for stage in stages[:-1])]
    return max(
        before + estimate_disk(stage.plan, stage.skeleton, calibrated)
        for before, stage in zip(earlier, stages, strict=True)
    )


def estimate_stages(stages: Sequence[Stage], calibrated: bool, sampled: bool) -> Estimate:
    """Peak disk, peak memory and rough time of all stages; the original writes the text once."""
    found = []
    for number, stage in enumerate(stages):
        opened = stage.opened
        cost = estimate(opened.plan, opened.skeleton, calibrated, sampled and number == 0)
        if stage.transform is not None and stage.transform.edits_blocks:
            cost = _with_hessians(cost, opened)
        found.append(cost)
    return Estimate(
        stages_disk([stage.opened for stage in stages], calibrated),
        max(cost.memory for cost in found),
        sum(cost.seconds for cost in found),
    )


def _with_hessians(cost: Estimate, opened: Opened) -> Estimate:
    """What it takes besides to gather one Hessian per block and sweep its columns."""
    settings = opened.plan.recipe.calibration
    targets = opened.skeleton.targets.values()
    columns = max(target.cols for target in targets if target.kind == "blocks")
    flops = 2.0 * len(opened.skeleton.blocks) * columns**2
    flops *= settings.samples * settings.length + columns
    return Estimate(
        cost.disk,
        cost.memory + 4 * FLOAT * columns**2,
        cost.seconds + flops / _flops_per_second(),
    )


def _states_bytes(plan: Plan, skeleton: Skeleton) -> int:
    """Bytes of the activations between two blocks: calibration, and held out twice."""
    settings = plan.recipe.calibration
    hidden = skeleton.model.get_input_embeddings().weight.shape[1]
    return int((settings.samples + 2 * settings.held_out) * settings.length * hidden * FLOAT)


def written(out: Path) -> int:
    """Bytes of files already there."""
    return sum(f.stat().st_size for f in out.rglob("*") if f.is_file()) if out.exists() else 0
