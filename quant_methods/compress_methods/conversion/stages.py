"""Carrying out a recipe's stages one after another, each from the directory the last one wrote.

A stage is one sweep over the model. Passes that keep shapes share the sweep of what follows them,
so smoothing and packing read the model once; a pass that reshapes ends its sweep. All stages are
planned from the original's headers before any work. Each but the last is a directory of its own in
OUT/.work, journaled and verified like a conversion, and deleted when the next is done; the last one
is written into OUT. Beside them lie the original's held-out states, which the results of all stages
are compared with.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from compress_methods.checkpoint.compressed import read_json
from compress_methods.checkpoint.integrity import find_damaged, read_checked, write_checked
from compress_methods.checkpoint.interchange import Layout
from compress_methods.checkpoint.interchange.own import OWN
from compress_methods.checkpoint.loading.tied import open_skeleton, untie, untied
from compress_methods.checkpoint.sharding import shares_heads
from compress_methods.checkpoint.source import Source, name_of, open_source, resolve_model
from compress_methods.conversion.driver import Sweep, Target
from compress_methods.conversion.finalize import StageSummary, finalize
from compress_methods.conversion.history import History
from compress_methods.conversion.journal import REPORT, WORK, Journal
from compress_methods.conversion.part import Planned
from compress_methods.conversion.passes.allocation import AllocatedPacking, find_groups
from compress_methods.conversion.passes.packing import Packing
from compress_methods.conversion.passes.zero_packing import pack_zeros
from compress_methods.conversion.planning.calibration import with_samples
from compress_methods.conversion.planning.plan import Plan
from compress_methods.conversion.planning.preview import preview, preview_plan
from compress_methods.conversion.planning.sharing import plan_shared, share_again
from compress_methods.conversion.running import Running
from compress_methods.errors import RecipeError
from compress_methods.evaluation.outputs.judge import require_tokens
from compress_methods.model.relayout import relaid, require_ours
from compress_methods.model.skeleton import Skeleton, build_skeleton
from compress_methods.recipe.stages import StagedRecipe
from compress_methods.transforms import Pass
from compress_methods.transforms.base import settings

BASE, STATES = "base.safetensors", "states"
PACKING = Packing.name


@dataclass(frozen=True)
class Stage:
    """One planned sweep. `passes` are the recipe's; `packs` says that a packing follows them.
    `config` and `changed` are the contents of config.json before and after it."""

    passes: tuple[Pass, ...]
    packs: bool
    target: Target
    config: dict[str, Any]
    changed: dict[str, Any]

    @property
    def planned(self) -> Planned:
        return self.target.planned

    @property
    def reshaping(self) -> Pass | None:
        """The pass that ends the sweep with other shapes."""
        return next((visitor for visitor in self.passes if visitor.reshapes), None)

    @property
    def name(self) -> str:
        names = [visitor.name for visitor in self.passes]
        return "+".join([*names, PACKING] if self.packs else names)

    @property
    def needs_text(self) -> bool:
        """Whether calibration text has to run through the model."""
        return any(visitor.needs_text for visitor in self.passes) or (
            self.packs and self.planned.plan.needs_calibration
        )

    def facts(self) -> dict[str, Any]:
        """What the stage is and changes, for plan and report."""
        if not self.passes:
            return {"stage": self.name}
        of_model = self.planned.skeleton.model.config
        changes = {
            key: [getattr(of_model, key, None), value]
            for key, value in self.changed.items()
            if self.config.get(key) != value and getattr(of_model, key, None) != value
        }
        every = [settings(visitor) for visitor in self.passes]
        return {
            "stage": self.name,
            "settings": every[0] if len(every) == 1 else every,
            "changes": changes,
        }


def open_stages(
    model: str | Path,
    recipe: StagedRecipe,
    allow_pickle: bool = False,
    tensor_parallel_size: int = 1,
    *,
    layout: Layout = OWN,
    quiet: bool = True,
    kept_dtype: str | None = None,
) -> list[Stage]:
    """Plan every stage from the original's headers; writes nothing, and reads no weights but those
    whose zeros `pack_zeros` has to count, which shows progress unless `quiet`. `samples: auto` is
    settled in the plans. `kept_dtype`: of matrices that another tool quantized and no rule packs.

    Raises a `CompressError` for whatever a stage could not do.
    """
    directory = resolve_model(model, allow_pickle)
    skeleton = open_skeleton(directory, allow_pickle)
    _check_measures(recipe, skeleton)
    source = open_source(directory, skeleton, name_of(model), allow_pickle)
    source = source if kept_dtype is None else source.kept_in(kept_dtype)
    config = read_json(directory / "config.json")
    config.pop("quantization_config", None)
    config = {**skeleton.architecture.added_config, **relaid(config)}
    require_ours(config, plain=recipe.packing is None or layout is not OWN)
    if not skeleton.tied and build_skeleton(directory).tied:
        config = untied(config)
    if skeleton.tied and any(visitor.turns for visitor in recipe.transforms):
        (skeleton, source), config = untie(directory, skeleton, source), untied(config)
    stages = []
    for passes, packs in _sweeps(recipe):
        reshaping = next((visitor for visitor in passes if visitor.reshapes), None)
        if packs:
            plan = _packing_plan(
                recipe, passes, skeleton, source, tensor_parallel_size, layout, quiet
            )
            target = Target(Planned(skeleton, source, plan), source.entries, _all(skeleton))
            stages.append(Stage(passes, True, target, config, config))
        elif reshaping is None:
            target = _kept_target(passes[-1], recipe, skeleton, source, config)
            stages.append(Stage(passes, False, target, config, config))
        else:
            made = preview(reshaping, skeleton, source, config)
            _check_parallel(made.skeleton.model.config, reshaping.name, tensor_parallel_size)
            plan = preview_plan(reshaping, recipe.calibration, skeleton, source, made)
            planned = Planned(skeleton, source, plan)
            layers = range(len(made.skeleton.blocks))
            target = Target(planned, made.source.entries, layers)
            stages.append(Stage(passes, False, target, config, made.config))
            skeleton, source, config = made.skeleton, made.source, made.config
    return with_samples(stages)


def _check_measures(recipe: StagedRecipe, skeleton: Skeleton) -> None:
    """`RecipeError` where the recipe judges by tokens and the model gives none."""
    packing = recipe.packing
    rules = packing.modules if packing is not None else ()
    asked = {
        "prune_to": recipe.search is not None or recipe.level is not None,
        "budget": packing is not None and packing.budget is not None,
        "loss_groups": any(rule.algorithm.loss_groups for rule in rules),
    }
    for what, is_asked in asked.items():
        if is_asked:
            require_tokens(skeleton, what)


def _sweeps(recipe: StagedRecipe) -> Iterator[tuple[tuple[Pass, ...], bool]]:
    """The passes that share a sweep, and whether the packing ends it."""
    packs = recipe.packing is not None
    waiting: list[Pass] = []
    for visitor in recipe.transforms:
        if visitor.turns and waiting:
            raise RecipeError(f"{visitor.name}: has to come before {waiting[0].name}")
        waiting.append(visitor)
        if visitor.reshapes:
            yield _checked(waiting, False), False
            waiting = []
    if packs or waiting:
        yield _checked(waiting, packs), packs


def _checked(passes: Sequence[Pass], packs: bool) -> tuple[Pass, ...]:
    for visitor in passes:
        visitor.check_sweep(packs)
    return tuple(passes)


def _all(skeleton: Skeleton) -> range:
    return range(len(skeleton.blocks))


def _packing_plan(
    recipe: StagedRecipe,
    passes: Sequence[Pass],
    skeleton: Skeleton,
    source: Source,
    ways: int,
    layout: Layout,
    quiet: bool,
) -> Plan:
    packing = recipe.packing
    assert packing is not None
    if packing.pack_zeros:
        packing = pack_zeros(packing, skeleton, source, ways, quiet=quiet)
    return plan_shared(passes, packing, skeleton, source, ways, layout)


def _kept_target(
    last: Pass,
    recipe: StagedRecipe,
    skeleton: Skeleton,
    source: Source,
    config: Mapping[str, Any],
) -> Target:
    """A plain model comes out, its shapes those that went in."""
    made = preview(last, skeleton, source, config)
    plan = preview_plan(last, recipe.calibration, skeleton, source, made)
    return Target(Planned(skeleton, source, plan), source.entries, _all(skeleton))


def _check_parallel(config: Any, name: str, ways: int) -> None:
    """`RecipeError` where vLLM could not run what a transform leaves over `ways` ranks."""
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    if not shares_heads(heads, groups, ways):
        raise RecipeError(
            f"{name}: leaves {heads} heads and {groups} KV heads, which tensor-parallel {ways} "
            f"cannot share; prune less attention or set tensor_parallel: {ways}"
        )
    if config.intermediate_size % ways:
        raise RecipeError(
            f"{name}: leaves {config.intermediate_size} channels, which tensor-parallel {ways} "
            "cannot share; choose another multiple"
        )


def run_stages(
    recipe: StagedRecipe,
    stages: list[Stage],
    journal: Journal,
    tokens: Tensor | None,
    run_facts: Callable[[Sweep], dict[str, Any]],
    running: Running,
) -> dict[str, Any]:
    """Carry out planned stages into `journal.directory`; returns the report.

    `tokens` as `Sweep` takes them; `run_facts` gives what a report needs to know of a sweep.
    """
    history = History.begin(recipe, stages[0].planned.source)
    base_path = journal.work / BASE
    _forget_damaged_stage(journal, len(stages), tokens is not None)
    for number, stage in enumerate(stages, 1):
        place = journal.work / f"stage-{number}"
        earlier = journal.work / f"stage-{number - 1}"
        if place.name not in journal.finished:
            if number > 1:
                stage = _reopen(stage, earlier)
            base = _turned((read_checked(base_path) or {}).get(STATES), stages[: number - 1])
            several = f"{stage.name} ({number} of {len(stages)})"
            label = several if recipe.transforms else "converting"
            sweep = _sweep(stage, tokens, base, label, running)
            if number == len(stages):
                sweep.execute(journal)
                return running.processes.first(partial(_finalize, sweep, stage, history, run_facts))
            with closing(Journal(place, journal.fingerprint)) as inner:
                lost = tokens is not None and base is None
                if inner.complete and (lost or find_damaged(place)):
                    inner.reopen()
                if not inner.complete:
                    sweep.execute(inner)
                    if base is None and sweep.base is not None:
                        write_checked(base_path, {STATES: sweep.base})
                    _finalize(sweep, stage, history, run_facts)
            _record(journal, stage, place)
        line = journal.finished[place.name]
        history = history.after(line["dropped"], line["renamed"], line["stage"])
        shutil.rmtree(earlier, ignore_errors=True)
    raise AssertionError("the last stage has returned")


def _turned(base: Tensor | None, stages: Sequence[Stage]) -> Tensor | None:
    """The original's states as stages that are done would have them."""
    for visitor in (visitor for stage in stages for visitor in stage.passes):
        base = None if base is None else visitor.turned(base)
    return base


def _forget_damaged_stage(journal: Journal, count: int, runs_text: bool) -> None:
    """Begin with the first stage again where the last one that is done is not as written, or the
    original's states are not, which only the first stage can tell."""
    done = [n for n in range(1, count) if f"stage-{n}" in journal.finished]
    if not done:
        return
    lost = runs_text and read_checked(journal.work / BASE) is None
    if lost or find_damaged(journal.work / f"stage-{done[-1]}"):
        journal.forget(f"stage-{number}" for number in done)
        for place in journal.work.glob("stage-*"):
            shutil.rmtree(place)


def _sweep(
    stage: Stage, tokens: Tensor | None, base: Tensor | None, label: str, running: Running
) -> Sweep:
    planned, passes = stage.planned, list(stage.passes)
    if stage.packs:
        groups = find_groups(planned.plan, planned.skeleton.architecture)
        allowed = planned.plan.allowance.bytes
        passes.append(AllocatedPacking(tuple(groups), allowed) if groups else Packing())

    def retarget(target: Target, decided: Sequence[Pass]) -> Target:
        return _retarget(stage, target, decided)

    return Sweep(
        stage.target, passes, tokens, base, retarget=retarget, running=running, label=label
    )


def _retarget(stage: Stage, target: Target, decided: Sequence[Pass]) -> Target:
    """The target after passes that looked ahead have decided."""
    planned, last = target.planned, decided[-1]
    if isinstance(last, AllocatedPacking):
        plan = planned.plan.decided(last.formats)
        return replace(target, planned=replace(planned, plan=plan))
    if not last.reshapes:
        plan = share_again(decided[:-1], planned.plan, planned.skeleton, planned.source)
        return replace(target, planned=replace(planned, plan=plan))
    layers = last.layers(len(planned.skeleton.blocks))
    plan, entries, _ = _reshaped(stage, planned, last, layers)
    return Target(replace(planned, plan=plan), entries, layers)


def _reshaped(
    stage: Stage, planned: Planned, reshaping: Pass, layers: Sequence[int]
) -> tuple[Plan, Mapping[str, Any], dict[str, Any]]:
    """Plan, headers and config of what a pass leaves when these layers stay."""
    made = preview(reshaping, planned.skeleton, planned.source, stage.config, layers)
    scores = reshaping.facts().get("influence", ())
    calibration = planned.plan.recipe.calibration
    plan = preview_plan(reshaping, calibration, planned.skeleton, planned.source, made, scores)
    return plan, made.source.entries, made.config


def _finalize(
    sweep: Sweep,
    stage: Stage,
    history: History,
    run_facts: Callable[[Sweep], dict[str, Any]],
) -> dict[str, Any]:
    """Complete and verify the directory of a finished sweep; returns its report."""
    summary, config = None, stage.config
    if stage.passes:
        layers = list(sweep.target.layers)
        reshaping = next((visitor for visitor in sweep.passes if visitor.reshapes), None)
        if reshaping is not None:
            config = _reshaped(stage, sweep.planned, reshaping, layers)[2]
            stage = replace(stage, changed=config)
        own: dict[str, Any] = {"layers": layers, "influence": []}
        for visitor in sweep.passes:
            own |= visitor.facts()
        summary = StageSummary(history, {**stage.facts(), **own})
    elif history.recipe.transforms:
        summary = StageSummary(history, stage.facts())
    planned = sweep.planned
    return finalize(
        sweep.journal,
        planned.plan,
        planned.source,
        run_facts(sweep),
        config=config,
        summary=summary,
        quiet=sweep.running.quiet,
    )


def _reopen(stage: Stage, directory: Path) -> Stage:
    """A stage with its source as the stage before has written it, in place of planned headers."""
    skeleton = open_skeleton(directory)
    source = open_source(directory, skeleton, stage.planned.source.name, False)
    target = replace(stage.target, planned=Planned(skeleton, source, stage.planned.plan))
    if stage.reshaping is None:
        target = replace(target, entries=source.entries)
    return replace(stage, target=target, config=read_json(directory / "config.json"))


def _record(journal: Journal, stage: Stage, place: Path) -> None:
    """Journal a stage whose directory is complete."""
    reshaping = stage.reshaping
    assert reshaping is not None
    told = read_json(place / REPORT)["stages"][-1]
    decided = reshaping.decide([[score] for score in told["influence"]])
    plan, _, _ = _reshaped(stage, stage.planned, decided, told["layers"])
    facts = {"dropped": plan.dropped, "renamed": plan.renamed, "stage": told}
    journal.record(place.name, f"{WORK}/{place.name}/{REPORT}", facts)
