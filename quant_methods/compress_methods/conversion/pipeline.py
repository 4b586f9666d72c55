"""From a checkpoint and a recipe to a compressed checkpoint.

Plan everything, then one unit after another: load, gather, choose, pack, write, journal, move the
activations on, drop. At most one block of weights is in memory. The same command after a kill goes
on where it was; the result has the same bytes. What the run needs from calibration decides whether
any forward pass happens at all.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from compress_methods import __version__
from compress_methods.conversion.blocks import BlockRunner, batch_size
from compress_methods.conversion.calibration import describe, load_tokens
from compress_methods.conversion.checkpoint import Source, fingerprint, open_source, resolve_model
from compress_methods.conversion.finish import finish
from compress_methods.conversion.journal import Journal, sha256
from compress_methods.conversion.plan import EMBEDDINGS, Plan, Unit, make_plan
from compress_methods.conversion.preflight import require_room
from compress_methods.conversion.recipe import Recipe, load_recipe
from compress_methods.conversion.sampling import sample_from_model
from compress_methods.conversion.units import (
    CALIBRATION,
    HELD_BASE,
    HELD_COMPRESSED,
    Converter,
    compare_held_out,
    embedding_rows,
    read_matrix,
)
from compress_methods.errors import CompressError, OutputError
from compress_methods.memory import peak_bytes, return_large_blocks
from compress_methods.progress import Progress
from compress_methods.sharding import check_matrix
from compress_methods.skeleton import Skeleton, build_skeleton

TOKENS = "tokens.safetensors"


@dataclass(frozen=True)
class Opened:
    """A model and a recipe that fit each other."""

    skeleton: Skeleton
    source: Source
    plan: Plan


def open_job(
    model: str | Path,
    recipe: str | Path | Mapping[str, Any] | Recipe,
    allow_pickle: bool = False,
    tensor_parallel_size: int = 1,
) -> Opened:
    """Open model and recipe and plan the conversion; writes nothing, reads no weights."""
    parsed = load_recipe(recipe)
    directory = resolve_model(model)
    skeleton = build_skeleton(directory)
    source = open_source(directory, skeleton, Path(str(model)).name, allow_pickle)
    plan = make_plan(parsed, skeleton, source)
    for job in plan.jobs:
        target = job.target
        shape = (target.rows, target.cols)
        check_matrix(target.module, target.kind, shape, job.format, tensor_parallel_size)
    return Opened(skeleton, source, plan)


def check_calibration(job: Opened, calibration: str | Path | None) -> Tensor | None:
    """Calibration tokens of the user's text, or None; `CalibrationError` where it can't be used."""
    if calibration is None:
        return None
    settings = job.plan.recipe.calibration
    return load_tokens(Path(calibration), _tokenizer(job.source.directory), settings)


def convert(
    model: str | Path,
    recipe: str | Path | Mapping[str, Any] | Recipe,
    out: str | Path,
    *,
    calibration: str | Path | None = None,
    allow_pickle: bool = False,
    tensor_parallel_size: int = 1,
    quiet: bool = False,
) -> dict[str, Any]:
    """Compress `model` (directory or hub id) by `recipe` into `out`; returns the report.

    `calibration` is a .txt, .jsonl or .parquet file. Without it, algorithms that need calibration
    get text sampled from the model itself. Raises a `CompressError` subclass for anything the user
    can fix; `out` then holds nothing, or finished units that the same call will continue from.
    """
    began = time.monotonic()
    job = open_job(model, recipe, allow_pickle, tensor_parallel_size)
    path = None if calibration is None else Path(calibration)
    given = check_calibration(job, path)
    require_room(job.plan, job.skeleton, Path(out), given is not None or job.plan.needs_calibration)
    try:
        journal = Journal(Path(out), _fingerprint(job, path))
    except OSError as problem:
        raise OutputError(f"{out}: {problem.strerror or problem}") from problem
    try:
        if journal.complete:
            return finish(journal, job.plan, job.source, {}, quiet=quiet)
        run = _Run(job, journal, quiet)
        run.prepare_tokens(given)
        run.convert_units()
        facts = {
            "calibration": _calibration_facts(job.plan, path, run.tokens),
            "held_out": run.held_out,
            "seconds": time.monotonic() - began,
            "peak_memory_bytes": peak_bytes(),
        }
        return finish(journal, job.plan, job.source, facts, quiet=quiet)
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


class _Run:
    """The state of one conversion."""

    def __init__(self, job: Opened, journal: Journal, quiet: bool) -> None:
        self.job = job
        self.journal = journal
        self.quiet = quiet
        self.tokens: Tensor | None = None
        self.held_out: dict[str, Any] | None = None

    def prepare_tokens(self, given: Tensor | None) -> None:
        """Calibration tokens [samples + held_out, length]: given, kept from before, or sampled."""
        if given is not None:
            self.tokens = given
        elif self.job.plan.needs_calibration:
            source, settings = self.job.source, self.job.plan.recipe.calibration
            kept, tokenizer = self.journal.work / TOKENS, _tokenizer(source.directory)
            return_large_blocks()
            with Progress(1, "sampling calibration text", quiet=self.quiet) as progress:
                self.tokens = sample_from_model(source, tokenizer, settings, progress, kept)

    def convert_units(self) -> None:
        units = self.job.plan.units
        finished = self.journal.finished
        sizes = {unit.name: self._size(unit) for unit in units}
        done = sum(size for name, size in sizes.items() if name in finished)
        with Progress(sum(sizes.values()), "converting", done=done, quiet=self.quiet) as progress:
            converter = Converter(self.job.skeleton, self.job.source, self.journal, progress)
            for unit in units:
                if unit.name not in finished:
                    self._start_runner(converter, unit)
                    began = time.monotonic()
                    facts = converter.convert(unit)
                    facts["seconds"] = time.monotonic() - began
                    self.journal.record(unit.name, unit.file, facts)
                    self.journal.drop_states(unit.block or 0)
            if self.tokens is not None:
                self._start_runner(converter, None)
                self._compare(converter)

    def _size(self, unit: Unit) -> int:
        source = self.job.source
        matrices = sum(source.entry(f"{job.target.module}.weight").nbytes for job in unit.jobs)
        return matrices + sum(source.entries[name].nbytes for name in unit.copies)

    def _start_runner(self, converter: Converter, unit: Unit | None) -> None:
        """Before the first unit that needs it: materialize what surrounds the blocks, embed."""
        if self.tokens is None or converter.runner is not None:
            return
        if unit is not None and unit.block is None:
            return
        return_large_blocks()
        skeleton, settings = self.job.skeleton, self.job.plan.recipe.calibration
        runner = BlockRunner(skeleton, batch_size(settings.samples, settings.held_out))
        tables = {f"{skeleton.embedding}.weight", f"{skeleton.head}.weight"}
        for name in skeleton.parameter_names():
            if skeleton.block_of(name) is None and name not in tables:
                runner.load({name: self.job.source.read(name)})
        index = len(skeleton.blocks)
        if unit is not None and unit.block is not None and unit.block >= 0:
            index = unit.block
        converter.states = self._states(converter, runner, index)
        converter.runner = runner

    def _states(self, converter: Converter, runner: BlockRunner, index: int) -> dict[str, Tensor]:
        assert self.tokens is not None
        unit = next(u for u in self.job.plan.units if u.name == EMBEDDINGS)
        rows, samples = self.tokens.unique(), self.job.plan.recipe.calibration.samples
        tables = embedding_rows(converter, unit, rows)
        saved = self.journal.load_states(index)
        if saved is not None:
            runner.embed(self.tokens[: runner.batch], tables["base"], rows)
            return saved
        calibration, held = self.tokens[:samples], self.tokens[samples:]
        return {
            CALIBRATION: runner.embed(calibration, tables["compressed"], rows),
            HELD_BASE: runner.embed(held, tables["base"], rows),
            HELD_COMPRESSED: runner.embed(held, tables["compressed"], rows),
        }

    def _compare(self, converter: Converter) -> None:
        """Perplexity and KL on the held-out sequences, without ever holding the whole model."""
        skeleton, plan = self.job.skeleton, self.job.plan
        if not plan.recipe.calibration.held_out:
            return
        owner = skeleton.tied.get(skeleton.head, skeleton.head)
        job = next((j for j in plan.jobs if j.target.module == owner), None)
        base = self.job.source.read(f"{owner}.weight").float()
        compressed = base
        if job is not None:
            unit = next(u for u in plan.units if job in u.jobs)
            compressed = read_matrix(self.journal.directory / unit.file, job).unpack()
        assert converter.runner is not None
        assert converter.states is not None
        assert self.tokens is not None
        held = self.tokens[plan.recipe.calibration.samples :]
        weights = {"base": base, "compressed": compressed}
        fmt = None if job is None else job.format
        sums = compare_held_out(converter.runner, converter.states, held, weights, fmt)
        self.held_out = sums.result().to_dict()


def _tokenizer(directory: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory, local_files_only=True)


def _fingerprint(job: Opened, calibration: Path | None) -> str:
    text = "model" if job.plan.needs_calibration else "none"
    if calibration is not None:
        text = sha256(calibration)
    parts = (fingerprint(job.source), job.plan.recipe.sha256, text, __version__)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _calibration_facts(plan: Plan, path: Path | None, tokens: Tensor | None) -> dict[str, Any]:
    if tokens is None:
        return {"source": "none needed"}
    settings = plan.recipe.calibration
    return {
        "source": describe(path),
        "sequences": settings.samples,
        "held_out_sequences": settings.held_out,
        "length": settings.length,
        "seed": settings.seed,
    }
