"""Carrying out a recipe's stages one after another, each from the directory the last one wrote.

All stages are planned from the original's headers before any work. Each but the last is a directory
of its own in OUT/.work, journaled and verified like a conversion, and deleted when the next is
done; the last one is written into OUT. Beside them lie the original's held-out states, which the
results of all stages are compared with.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from compress_methods.compressed import read_json
from compress_methods.conversion.chain import Chain
from compress_methods.conversion.checkpoint import open_source, resolve_model
from compress_methods.conversion.finish import Told, finish
from compress_methods.conversion.history import History
from compress_methods.conversion.journal import REPORT, WORK, Journal
from compress_methods.conversion.outline import outline, transform_plan
from compress_methods.conversion.plan import make_plan
from compress_methods.conversion.reshape import Reshape
from compress_methods.conversion.run import Opened, Run
from compress_methods.conversion.split import Split
from compress_methods.conversion.zeros import pack_zeros
from compress_methods.errors import RecipeError
from compress_methods.safetensors_io import read_tensors, write_tensors
from compress_methods.sharding import shares_heads
from compress_methods.skeleton import build_skeleton
from compress_methods.transforms import Transform

BASE, STATES = "base.safetensors", "states"
PACKING = "packing"


@dataclass(frozen=True)
class Stage:
    """One planned stage: `transform` is None for the packing. `config` and `changed` are the
    contents of config.json before and after it."""

    transform: Transform | None
    opened: Opened
    config: dict[str, Any]
    changed: dict[str, Any]

    @property
    def name(self) -> str:
        return PACKING if self.transform is None else self.transform.name

    def facts(self) -> dict[str, Any]:
        """What the stage is and changes, for plan and report."""
        if self.transform is None:
            return {"stage": self.name}
        settings = self.opened.skeleton.model.config
        changes = {
            key: [getattr(settings, key, None), value]
            for key, value in self.changed.items()
            if self.config.get(key) != value and getattr(settings, key, None) != value
        }
        return {
            "stage": self.name,
            "settings": asdict(self.transform),
            "changes": changes,
        }


def open_stages(
    model: str | Path,
    chain: Chain,
    allow_pickle: bool = False,
    tensor_parallel_size: int = 1,
    *,
    quiet: bool = True,
) -> list[Stage]:
    """Plan every stage from the original's headers; writes nothing, and reads no weights but those
    whose zeros `pack_zeros` has to count, which shows progress unless `quiet`.

    Raises a `CompressError` for whatever a stage could not do.
    """
    directory = resolve_model(model)
    skeleton = build_skeleton(directory)
    source = open_source(directory, skeleton, Path(str(model)).name, allow_pickle)
    config = read_json(directory / "config.json")
    stages = []
    for transform in chain.transforms:
        made = outline(transform, skeleton, source, config)
        _check_parallel(made.skeleton.model.config, transform.name, tensor_parallel_size)
        plan = transform_plan(transform, chain.calibration, skeleton, source, made)
        stages.append(Stage(transform, Opened(skeleton, source, plan), config, made.config))
        skeleton, source, config = made.skeleton, made.source, made.config
    if chain.packing is not None:
        packing = chain.packing
        if packing.pack_zeros:
            packing = pack_zeros(packing, skeleton, source, tensor_parallel_size, quiet=quiet)
        plan = make_plan(packing, skeleton, source, tensor_parallel_size)
        stages.append(Stage(None, Opened(skeleton, source, plan), config, config))
    return stages


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
    chain: Chain,
    stages: list[Stage],
    journal: Journal,
    tokens: Tensor | None,
    finish_facts: Callable[[Run], dict[str, Any]],
    *,
    quiet: bool,
) -> dict[str, Any]:
    """Carry out planned stages into `journal.directory`; returns the report.

    `tokens` as `Run` takes them; `finish_facts` gives what a report needs to know of a run.
    """
    history = History.begin(chain, stages[0].opened.source)
    base_path = journal.work / BASE
    for number, stage in enumerate(stages, 1):
        place = journal.work / f"stage-{number}"
        earlier = journal.work / f"stage-{number - 1}"
        if place.name not in journal.finished:
            if number > 1:
                stage = _reopen(stage, earlier)
            base = read_tensors(base_path)[STATES] if base_path.exists() else None
            label = (
                f"{stage.name} ({number} of {len(stages)})" if chain.transforms else "converting"
            )
            run = _run(stage, tokens, base, label, quiet)
            if number == len(stages):
                run.execute(journal)
                return _finish(run, stage, history, finish_facts, quiet)
            with closing(Journal(place, journal.fingerprint)) as inner:
                if not inner.complete:
                    run.execute(inner)
                    if base is None and run.base is not None:
                        write_tensors(base_path, {STATES: run.base})
                    _finish(run, stage, history, finish_facts, quiet)
            _record(journal, stage, place)
        line = journal.finished[place.name]
        history = history.after(line["dropped"], line["renamed"], line["stage"])
        shutil.rmtree(earlier, ignore_errors=True)
    raise AssertionError("the last stage has returned")


def _run(stage: Stage, tokens: Tensor | None, base: Tensor | None, label: str, quiet: bool) -> Run:
    opened = stage.opened
    if stage.transform is None:
        split = any(job.choices for job in opened.plan.jobs)
        return (Split if split else Run)(opened, tokens, base, label=label, quiet=quiet)
    return Reshape(stage.transform, stage.config, opened, tokens, base, label=label, quiet=quiet)


def _finish(
    run: Run,
    stage: Stage,
    history: History,
    finish_facts: Callable[[Run], dict[str, Any]],
    quiet: bool,
) -> dict[str, Any]:
    told, config = None, stage.config
    if history.chain.transforms:
        told = Told(history, stage.facts())
    if isinstance(run, Reshape):
        config = run.made.config
        stage = replace(stage, changed=config)
        told = Told(history, {**stage.facts(), "layers": run.kept, "influence": run.scores})
    job, facts = run.job, finish_facts(run)
    return finish(run.journal, job.plan, job.source, facts, config=config, told=told, quiet=quiet)


def _reopen(planned: Stage, directory: Path) -> Stage:
    """A stage with its source as the stage before has written it, in place of planned headers."""
    skeleton = build_skeleton(directory)
    source = open_source(directory, skeleton, planned.opened.source.name, False)
    opened = Opened(skeleton, source, planned.opened.plan)
    return replace(planned, opened=opened, config=read_json(directory / "config.json"))


def _record(journal: Journal, stage: Stage, place: Path) -> None:
    """Journal a stage whose directory is complete."""
    assert stage.transform is not None
    opened = stage.opened
    told = read_json(place / REPORT)["stages"][-1]
    made = outline(stage.transform, opened.skeleton, opened.source, stage.config, told["layers"])
    plan = transform_plan(
        *(stage.transform, opened.plan.recipe.calibration, opened.skeleton, opened.source, made),
        scores=told["influence"],
    )
    facts = {"dropped": plan.dropped, "renamed": plan.renamed, "stage": told}
    journal.record(place.name, f"{WORK}/{place.name}/{REPORT}", facts)
