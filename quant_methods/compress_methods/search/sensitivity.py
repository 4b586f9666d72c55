"""sensitivity: what each group of matrices costs a model in each format, before any is chosen.

The survey of `conversion/passes/allocation.py` alone, on the formats that a recipe names: for every
group that vLLM fuses and every format, the bytes, how far the block's output drifts on calibration
text, and the KL of the model's predictions that follows. Nothing is converted.

Only matrices of decoder blocks are measured. KLs of groups add up as far as they are small.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from compress_methods.conversion.driver import Sweep
from compress_methods.conversion.job import (
    TOKENS,
    check_calibration,
    job_fingerprint,
    sample_tokens,
)
from compress_methods.conversion.journal import Journal
from compress_methods.conversion.passes.allocation import AllocatedPacking, Group, find_groups
from compress_methods.conversion.planning.plan import Job, Plan
from compress_methods.conversion.running import Running
from compress_methods.conversion.stages import open_stages
from compress_methods.errors import OutputError, RecipeError, named, nearest
from compress_methods.recipe.stages import StagedRecipe


@dataclass(frozen=True)
class Cost:
    """Of one group in one format: `drift` is ||h' - h||^2 / ||h||^2 of its block's output, `kl`
    nats per token."""

    bytes: int
    bits_per_weight: float
    drift: float
    kl: float


@dataclass(frozen=True)
class Sensitivity:
    """One group: `group` is its name in the layer, `formats` what it costs in each, smallest
    first."""

    layer: int
    group: str
    modules: tuple[str, ...]
    weights: int
    formats: dict[str, Cost]

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)


def measure_sensitivity(
    model: str | Path,
    recipe: StagedRecipe,
    work: Path,
    *,
    formats: Sequence[str] = (),
    calibration: str | Path | None = None,
    allow_pickle: bool = False,
    running: Running,
) -> list[Sensitivity]:
    """Measure all groups, in order, in `formats` of the recipe, or as its rules say without; `work`
    keeps what is done, so that a call that was killed can go on. Raises a `CompressError` for
    anything the user can fix."""
    recipe = _measurable(recipe, formats)
    stages = open_stages(model, recipe, allow_pickle)
    planned = stages[0].planned
    plan = _all_open(planned.plan)
    groups = find_groups(plan, planned.skeleton.architecture, least=1)
    if not groups:
        raise RecipeError(f"recipe {recipe.name!r}: names no matrix of a decoder block")
    text = check_calibration(planned.source.directory, recipe.calibration, calibration)
    fingerprint = job_fingerprint(recipe, stages, text, running)
    try:
        journal = Journal(work, hashlib.sha256(f"sensitivity {fingerprint}".encode()).hexdigest())
    except OSError as problem:
        raise OutputError(named(problem, work)) from problem
    with closing(journal):
        tokens = text.tokens
        if tokens is None:
            tokens = sample_tokens(stages, journal.work / TOKENS, running)
        sweep = Sweep(
            replace(stages[0].target, planned=replace(planned, plan=plan)),
            [AllocatedPacking(tuple(groups))],
            tokens[: recipe.calibration.samples],
            torch.empty(0),
            running=running,
            label="measuring sensitivity",
        )
        sweep.look_ahead(journal)
    packing = sweep.passes[0]
    assert isinstance(packing, AllocatedPacking)
    return list(_rows(packing))


def _measurable(recipe: StagedRecipe, formats: Sequence[str]) -> StagedRecipe:
    """The recipe without its budget, its rules as `formats` say."""
    packing = recipe.packing
    if recipe.transforms or packing is None or recipe.prune_to is not None:
        raise RecipeError(f"recipe {recipe.name!r}: has stages; give one that only packs")
    for name in formats:
        if name not in packing.formats:
            known = nearest(name, packing.formats)
            raise RecipeError(f"recipe {recipe.name!r}: has no format {name!r}; {known}")
    rules = packing.modules
    if formats:
        candidates = tuple(formats) if len(formats) > 1 else ()
        for rule, name in product(rules, formats):
            rule.algorithm.check_format(packing.formats[name])
        rules = tuple(replace(rule, format=formats[0], candidates=candidates) for rule in rules)
    return replace(recipe, packing=replace(packing, modules=rules, budget=None))


def _all_open(plan: Plan) -> Plan:
    """The plan with every format of a block's matrix as a choice, if only of one."""

    def opened(job: Job) -> Job:
        if job.open:
            return job
        if not job.choices:
            return replace(job, choices=(job.format,), variants=(job.format_name,))
        names = (job.decided(fmt, {}).format_name for fmt in job.choices)
        return replace(job, variants=tuple(names))

    shards = (replace(s, jobs=tuple(opened(job) for job in s.jobs)) for s in plan.shards)
    return replace(plan, shards=tuple(shards))


def _rows(packing: AllocatedPacking) -> Iterator[Sensitivity]:
    for group, measured in zip(packing.groups, packing.measured, strict=True):
        weights = sum(job.slot.rows * job.slot.cols for job in group.jobs)
        first = group.jobs[0]
        names = [str(first.variants[first.choices.index(fmt)]) for fmt in group.choices]
        found = zip(names, group.sizes, measured.drifts, measured.losses, strict=True)
        yield Sensitivity(
            group.block,
            _short(group),
            tuple(job.slot.module for job in group.jobs),
            weights,
            {n: Cost(size, 8 * size / weights, drift, kl) for n, size, drift, kl in found},
        )


def _short(group: Group) -> str:
    """The group's name without those of its block."""
    return group.name.partition(f".{group.block}.")[2]


def totals(rows: Sequence[Sensitivity]) -> dict[str, dict[str, float]]:
    """Bytes, bits per weight and the sum of the KLs of every format that all groups have."""
    names = [n for n in rows[0].formats if all(n in row.formats for row in rows)]
    weights = sum(row.weights for row in rows)
    return {
        name: {
            "bytes": (size := sum(row.formats[name].bytes for row in rows)),
            "bits_per_weight": 8 * size / weights,
            "kl": sum(row.formats[name].kl for row in rows),
        }
        for name in names
    }
