"""From a checkpoint and a recipe to a compressed checkpoint.

Plan everything, then one stage after another, in each one unit after another: load, gather, choose,
pack, write, journal, move the activations on, drop. At most one block of weights is in memory. The
same command after a kill goes on where it was; the result has the same bytes. What the run needs
from calibration decides whether any forward pass happens at all.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from compress_methods import __version__
from compress_methods.compressed import read_json
from compress_methods.conversion.calibration import CalibrationSettings, describe, load_tokens
from compress_methods.conversion.chain import Chain, load_chain
from compress_methods.conversion.checkpoint import fingerprint
from compress_methods.conversion.journal import REPORT, Journal, sha256
from compress_methods.conversion.preflight import require_room, stages_disk
from compress_methods.conversion.recipe import Recipe
from compress_methods.conversion.run import Opened, Run
from compress_methods.conversion.sampling import sample_from_model
from compress_methods.conversion.stages import Stage, open_stages, run_stages
from compress_methods.errors import CompressError, OutputError, RecipeError
from compress_methods.evaluate import load_tokenizer
from compress_methods.memory import peak_bytes, return_large_blocks
from compress_methods.progress import Progress

TOKENS = "tokens.safetensors"


@dataclass(frozen=True)
class Text:
    """Calibration text: the user's file and its tokens [samples + held_out, length], or neither."""

    path: Path | None = None
    tokens: Tensor | None = None


def open_job(
    model: str | Path,
    recipe: str | Path | Mapping[str, Any] | Recipe,
    allow_pickle: bool = False,
    tensor_parallel_size: int = 1,
) -> Opened:
    """Open model and recipe and plan the conversion, as `open_stages` does.

    Of several stages the last one's plan, its `original_bytes` those of the original.
    """
    chain = load_chain(recipe)
    if chain.prune_to is not None:
        raise RecipeError(f"recipe {chain.name!r} searches how far to prune; only convert can")
    stages = open_stages(model, chain, allow_pickle, tensor_parallel_size)
    opened, original = stages[-1].opened, stages[0].opened.source
    plan = dataclasses.replace(opened.plan, original_bytes=original.nbytes)
    return Opened(opened.skeleton, opened.source, plan)


def check_calibration(
    directory: Path, settings: CalibrationSettings, calibration: str | Path | None
) -> Text:
    """Calibration tokens of the user's text, if any; `CalibrationError` where it can't be used."""
    if calibration is None:
        return Text()
    path = Path(calibration)
    return Text(path, load_tokens(path, load_tokenizer(directory), settings))


def needs_calibration(stages: list[Stage]) -> bool:
    """Whether some stage cannot do without text."""
    return stages[0].transform is not None or stages[-1].opened.plan.needs_calibration


def convert(
    model: str | Path,
    recipe: str | Path | Mapping[str, Any] | Recipe | Chain,
    out: str | Path,
    *,
    calibration: str | Path | None = None,
    allow_pickle: bool = False,
    tensor_parallel_size: int = 1,
    quiet: bool = False,
) -> dict[str, Any]:
    """Compress `model` (directory or hub id) by `recipe` into `out`; returns the report.

    `calibration` is a .txt, .jsonl or .parquet file. Without it, stages that need calibration get
    text sampled from the model itself. Raises a `CompressError` subclass for anything the user can
    fix; `out` then holds nothing, or finished units that the same call will continue from.
    """
    chain = load_chain(recipe)
    if chain.prune_to is not None:
        from compress_methods.conversion.search import Search

        opening = (model, allow_pickle, tensor_parallel_size)
        return Search(chain, Path(out), calibration, opening, quiet=quiet).run()
    stages = open_stages(model, chain, allow_pickle, tensor_parallel_size, quiet=quiet)
    source = stages[0].opened.source
    text = check_calibration(source.directory, chain.calibration, calibration)
    if chain.transforms and not quiet:
        print(statement(stages), file=sys.stderr, flush=True)
    return carry_out(chain, stages, Path(out), text, quiet=quiet)


def statement(stages: list[Stage]) -> str:
    """What each stage will change and the bytes that come out, in lines for people."""
    lines = []
    for number, stage in enumerate(stages, 1):
        facts, plan = stage.facts(), stage.opened.plan
        changes = [f"{key} {a} -> {b}" for key, (a, b) in facts.get("changes", {}).items()]
        what = ", ".join(c for c in changes if "[" not in c) or plan.recipe.name
        lines.append(
            f"{number}. {stage.name}: {what}: {plan.original_bytes / 1e6:,.2f} MB -> "
            f"{plan.compressed_bytes / 1e6:,.2f} MB"
        )
    before = stages[0].opened.plan.original_bytes
    after = stages[-1].opened.plan.compressed_bytes
    return "\n".join([*lines, f"total: {before:,} -> {after:,} bytes ({after / before:.1%})"])


def carry_out(
    chain: Chain, stages: list[Stage], out: Path, text: Text, *, quiet: bool
) -> dict[str, Any]:
    """Carry out planned stages into `out`, going on from where an earlier call was stopped."""
    began = time.monotonic()
    calibrated = text.tokens is not None or needs_calibration(stages)
    require_room(stages_disk([stage.opened for stage in stages], calibrated), out)
    try:
        journal = Journal(out, job_fingerprint(chain, stages, text))
    except OSError as problem:
        raise OutputError(f"{out}: {problem.strerror or problem}") from problem
    try:
        if journal.complete:
            return read_json(out / REPORT)
        tokens = text.tokens
        if tokens is None and calibrated:
            tokens = sample_tokens(stages, journal.work / TOKENS, quiet=quiet)

        def facts(run: Run) -> dict[str, Any]:
            return {
                "calibration": _calibration_facts(chain.calibration, text.path, tokens),
                "held_out": run.held_out,
                "seconds": time.monotonic() - began,
                "peak_memory_bytes": peak_bytes(),
            }

        return run_stages(chain, stages, journal, tokens, facts, quiet=quiet)
    except OSError as problem:
        raise OutputError(
            f"{out}: {problem.strerror or problem}; what is finished is kept, "
            "the same command continues from there"
        ) from problem
    except CompressError:
        journal.abandon()
        raise
    finally:
        journal.close()


def sample_tokens(stages: list[Stage], kept: Path, *, quiet: bool) -> Tensor:
    """Calibration tokens [samples + held_out, length] that the original writes itself."""
    source = stages[0].opened.source
    settings = stages[0].opened.plan.recipe.calibration
    return_large_blocks()
    with Progress(1, "sampling calibration text", quiet=quiet) as progress:
        return sample_from_model(source, load_tokenizer(source.directory), settings, progress, kept)


def job_fingerprint(chain: Chain, stages: list[Stage], text: Text) -> str:
    """Of everything the result depends on."""
    used = "model" if needs_calibration(stages) else "none"
    if text.path is not None:
        used = sha256(text.path)
    parts = [fingerprint(stages[0].opened.source), chain.sha256, used, __version__]
    choices = [[c.n for c in job.choices] for job in stages[-1].opened.plan.jobs if job.choices]
    parts += [str(choices)] if choices else []
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _calibration_facts(
    settings: CalibrationSettings, path: Path | None, tokens: Tensor | None
) -> dict[str, Any]:
    if tokens is None:
        return {"source": "none needed"}
    return {
        "source": describe(path),
        "sequences": settings.samples,
        "held_out_sequences": settings.held_out,
        "length": settings.length,
        "seed": settings.seed,
    }
