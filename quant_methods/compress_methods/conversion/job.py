"""One conversion: its text, its fingerprint, its output directory.

Its stages are planned before any work and carried out one after another. The same command after a
kill goes on where it was; the result has the same bytes. What the stages need from calibration
decides whether any forward pass happens at all.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from compress_methods import __version__
from compress_methods.calibration.chat import has_template
from compress_methods.calibration.mix import FileFacts, files_name, load_files
from compress_methods.calibration.presets import (
    is_scripted,
    open_script,
    preset_identity,
    preset_name,
)
from compress_methods.calibration.self_generated import sample_from_model
from compress_methods.calibration.settings import CalibrationSettings
from compress_methods.calibration.tokenizer import load_tokenizer
from compress_methods.calibration.tokens import text_name
from compress_methods.checkpoint.source import fingerprint
from compress_methods.conversion.driver import Sweep
from compress_methods.conversion.journal import Journal, sha256
from compress_methods.conversion.part import Planned
from compress_methods.conversion.passes.divisible import require_divisible
from compress_methods.conversion.planning.calibration import calibration_advice, settings_of
from compress_methods.conversion.planning.plan import Shard
from compress_methods.conversion.recovery import verified
from compress_methods.conversion.resources import require_room, stages_disk
from compress_methods.conversion.running import Running
from compress_methods.conversion.stages import Stage, open_stages, run_stages
from compress_methods.errors import CalibrationError, CompressError, OutputError, RecipeError, named
from compress_methods.model.device import peak_device_bytes
from compress_methods.model.task import NEXT_TOKEN
from compress_methods.recipe.schema import Recipe
from compress_methods.recipe.stages import StagedRecipe, load_staged
from compress_methods.system.memory import peak_bytes
from compress_methods.system.processes import Processes
from compress_methods.system.progress import Progress

TOKENS = "tokens.safetensors"


@dataclass(frozen=True)
class Text:
    """Calibration text: tokens [samples + held_out, length] of the user's files, or the `preset`
    that the model is asked to write under, or neither. `source`, `facts` and `note` are for
    people, `identity` for fingerprints."""

    tokens: Tensor | None = None
    preset: str = ""
    source: str = text_name(None)
    identity: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    note: str | None = None

    @property
    def asked(self) -> bool:
        """Whether text is to run through the model even where no stage needs it."""
        return self.tokens is not None or bool(self.preset)


def open_job(
    model: str | Path,
    recipe: str | Path | Mapping[str, Any] | Recipe,
    allow_pickle: bool = False,
    tensor_parallel_size: int = 1,
) -> Planned:
    """Open model and recipe and plan the conversion, as `open_stages` does.

    Of several stages the last one's plan, its `original_bytes` those of the original.
    """
    staged = load_staged(recipe)
    if staged.search is not None:
        raise RecipeError(f"recipe {staged.name!r} searches how far to go; only convert can")
    stages = open_stages(model, staged, allow_pickle, tensor_parallel_size)
    planned, original = stages[-1].planned, stages[0].planned.source
    plan = dataclasses.replace(planned.plan, original_bytes=original.nbytes)
    return Planned(planned.skeleton, planned.source, plan)


def check_calibration(
    directory: Path,
    settings: CalibrationSettings,
    calibration: str | Path | Sequence[str | Path] | None,
) -> Text:
    """The text that is asked for, by the recipe or instead by `calibration`; files are read.
    Raises `CalibrationError` where it can't be used."""
    settings = settings.asked(calibration)
    if settings.files:
        tokenizer = load_tokenizer(directory)
        tokens, found = load_files(tokenizer, settings)
        digests = [sha256(file.path) for file in settings.files]
        if len(digests) > 1:
            digests = [f"{d} {f.weight:g}" for d, f in zip(digests, settings.files, strict=True)]
        return Text(
            tokens,
            source=files_name(found),
            identity="\n".join(digests),
            facts={"files": [asdict(one) for one in found]},
            note=_joined(found),
        )
    if is_scripted(settings.preset):
        tokenizer = load_tokenizer(directory)
        open_script(directory, tokenizer, settings)
        rendered = settings.rows if has_template(tokenizer) else 0
        return Text(
            preset=settings.preset,
            source=preset_name(settings.preset),
            identity=preset_identity(settings.preset),
            facts={"preset": settings.preset, "rendered": rendered},
        )
    return Text(preset=settings.preset, identity="model" if settings.preset else "")


def _joined(files: Sequence[FileFacts]) -> str | None:
    """A line where chats have become plain text."""
    joined = sum(one.joined for one in files)
    if not joined:
        return None
    return f"calibration: {joined:,} chats joined as plain text; the tokenizer has no chat template"


def needs_calibration(stages: list[Stage]) -> bool:
    """Whether some stage cannot do without text."""
    return any(stage.needs_text for stage in stages)


def statement(stages: list[Stage]) -> str:
    """What each stage will change and the bytes that come out, in lines for people."""
    lines = []
    for number, stage in enumerate(stages, 1):
        facts, plan = stage.facts(), stage.planned.plan
        changes = [f"{key} {a} -> {b}" for key, (a, b) in facts.get("changes", {}).items()]
        what = ", ".join(c for c in changes if "[" not in c) or plan.recipe.name
        lines.append(
            f"{number}. {stage.name}: {what}: {plan.original_bytes / 1e6:,.2f} MB -> "
            f"{plan.compressed_bytes / 1e6:,.2f} MB"
        )
    before = stages[0].planned.plan.original_bytes
    after = stages[-1].planned.plan.compressed_bytes
    return "\n".join([*lines, f"total: {before:,} -> {after:,} bytes ({after / before:.1%})"])


def carry_out(
    recipe: StagedRecipe, stages: list[Stage], out: Path, text: Text, running: Running
) -> dict[str, Any]:
    """Carry out planned stages into `out`, going on from where an earlier call was stopped."""
    began = time.monotonic()
    recipe = recipe.calibrated(settings_of(stages))
    calibrated = text.asked or needs_calibration(stages)
    processes = running.processes
    require_divisible(stages[-1].planned, calibrated, processes.count)
    if processes.leads:
        require_room(stages_disk([stage.planned for stage in stages], calibrated), out)
    identity = job_fingerprint(recipe, stages, text, running)
    require_same(processes.gathered(identity))
    journal = _opened(out, identity, processes)
    try:
        if journal.complete:
            whole = processes.first(
                lambda: verified(
                    journal,
                    stages[0].planned.source.directory,
                    _single(stages, calibrated),
                    running.quiet,
                )
            )
            if whole is not None:
                return whole
            journal.tell()
        advice = calibration_advice(stages)
        for line in (text.note, advice):
            if line and not running.quiet:
                print(line, file=sys.stderr, flush=True)
        tokens = text.tokens
        if tokens is None and calibrated:
            kept = journal.work / TOKENS
            tokens = processes.first(lambda: sample_tokens(stages, kept, running, text.preset))

        def facts(sweep: Sweep) -> dict[str, Any]:
            return {
                "calibration": _calibration_facts(recipe.calibration, text, tokens, advice),
                "held_out": sweep.held_out,
                "held_out_halves": sweep.held_out_halves,
                "passes": [found for visitor in sweep.passes if (found := visitor.facts())],
                "seconds": time.monotonic() - began,
                "peak_memory_bytes": peak_bytes(),
                "device": running.signature,
                "peak_device_bytes": peak_device_bytes(running.device),
            }

        return run_stages(recipe, stages, journal, tokens, facts, running)
    except OSError as problem:
        raise OutputError(
            f"{named(problem, out)}; what is finished is kept, "
            "the same command continues from there"
        ) from problem
    except CompressError:
        journal.abandon()
        raise
    finally:
        journal.close()


def _opened(out: Path, identity: str, processes: Processes) -> Journal:
    try:
        return Journal(out, identity, processes)
    except OSError as problem:
        raise OutputError(named(problem, out)) from problem


def require_same(identities: Sequence[str]) -> None:
    """`OutputError` where processes are about to work on different things."""
    for rank, identity in enumerate(identities):
        if identity != identities[0]:
            raise OutputError(
                f"process {rank} has another model, recipe, calibration text, device or version "
                "than process 0; all have to be given the same"
            )


def _single(stages: list[Stage], calibrated: bool) -> Sequence[Shard] | None:
    """The shards, where each can be converted without the others."""
    alone = len(stages) == 1 and not stages[0].passes and not calibrated
    return stages[0].planned.plan.shards if alone else None


def sample_tokens(stages: list[Stage], kept: Path, running: Running, preset: str = "") -> Tensor:
    """Calibration tokens [samples + held_out, length] that the original writes itself."""
    source, skeleton = stages[0].planned.source, stages[0].planned.skeleton
    if skeleton.architecture.loss != NEXT_TOKEN:
        kind = type(skeleton.model).__name__
        raise CalibrationError(f"{source.name}: {kind} writes no text; give --calibration FILE")
    settings = dataclasses.replace(settings_of(stages), files=(), preset=preset)
    tokenizer = load_tokenizer(source.directory)
    with Progress(1, "sampling calibration text", quiet=running.quiet) as progress:
        return sample_from_model(source, tokenizer, settings, progress, kept, running.device)


def job_fingerprint(recipe: StagedRecipe, stages: list[Stage], text: Text, running: Running) -> str:
    """Of everything the result depends on, the kind of device, threads and processes among it."""
    used = text.identity or ("model" if needs_calibration(stages) else "none")
    plan = stages[-1].planned.plan
    parts = [fingerprint(stages[0].planned.source), recipe.sha256, used, __version__]
    parts += [running.signature, str(running.dtype), plan.layout.name]
    choices = [list(job.variants) for job in plan.jobs if job.choices]
    parts += [str(choices)] if choices else []
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _calibration_facts(
    settings: CalibrationSettings, text: Text, tokens: Tensor | None, advice: str | None
) -> dict[str, Any]:
    if tokens is None:
        return {"source": "none needed"}
    return {
        "source": text.source,
        "sequences": settings.samples,
        "held_out_sequences": settings.held_out,
        "length": settings.length,
        "seed": settings.seed,
        **text.facts,
        **({"note": text.note} if text.note else {}),
        **({"advice": advice} if advice else {}),
    }
