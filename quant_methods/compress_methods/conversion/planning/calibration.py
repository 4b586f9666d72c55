"""How much calibration text planned stages have use for."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from compress_methods.algorithms import Hessian
from compress_methods.calibration.settings import TOKENS_PER_COLUMN, CalibrationSettings
from compress_methods.transforms import Pass

if TYPE_CHECKING:
    from compress_methods.conversion.stages import Stage


def settings_of(stages: list[Stage]) -> CalibrationSettings:
    """The calibration that all stages share."""
    return stages[0].planned.plan.recipe.calibration


def with_samples(stages: list[Stage]) -> list[Stage]:
    """The stages with `samples: auto` settled for the widest of all their matrices."""
    settings = settings_of(stages)
    if not settings.auto:
        return stages
    settled = settings.for_columns(widest_columns(stages))
    return [_with_settings(stage, settled) for stage in stages]


def _with_settings(stage: Stage, settings: CalibrationSettings) -> Stage:
    plan = stage.planned.plan
    plan = replace(plan, recipe=replace(plan.recipe, calibration=settings))
    target = replace(stage.target, planned=replace(stage.planned, plan=plan))
    return replace(stage, target=target)


def widest_columns(stages: list[Stage]) -> int:
    """Columns of the widest matrix whose inputs' Hessian is gathered; 0 where none is."""
    found = [0]
    for stage in stages:
        planned = stage.planned
        jobs = planned.plan.jobs
        found += [j.slot.cols for j in jobs if Hessian in j.algorithm.needs(j.format)]
        if any(type(visitor).visit is not Pass.visit for visitor in stage.passes):
            slots = planned.skeleton.slots.values()
            found += [slot.cols for slot in slots if slot.kind == "blocks"]
    return max(found)


def calibration_advice(stages: list[Stage]) -> str | None:
    """A line where the text is too short for a matrix: what rounds by its Hessian then fits the
    text instead of the model."""
    settings, columns = settings_of(stages), widest_columns(stages)
    least = TOKENS_PER_COLUMN * columns
    if settings.tokens >= least:
        return None
    return (
        f"calibration: {settings.samples} x {settings.length} = {settings.tokens:,} tokens, but a "
        f"matrix has {columns:,} columns; at least {least:,} are better (calibration: "
        f"{{samples: {math.ceil(least / settings.length)}, length: {settings.length}}})"
    )
