"""convert, import and recover: from a checkpoint and a recipe to a compressed checkpoint, from one
that another tool made, and from one and its original to a better one."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from compress_methods import __version__
from compress_methods.checkpoint.compressed import read_json
from compress_methods.checkpoint.interchange import LAYOUTS, Layout
from compress_methods.checkpoint.interchange.gguf.entries import METHOD as GGUF
from compress_methods.checkpoint.interchange.gguf.equals import equal_of
from compress_methods.checkpoint.interchange.own import OWN
from compress_methods.checkpoint.source import at_revision, resolve_model
from compress_methods.conversion.exchange.exporting import require_writable, write_gguf
from compress_methods.conversion.exchange.importing import REFUSE, UNPACK, import_recipe
from compress_methods.conversion.job import Text, carry_out, check_calibration, statement
from compress_methods.conversion.passes.divisible import require_divisible_recipe
from compress_methods.conversion.planning.calibration import settings_of
from compress_methods.conversion.running import Running
from compress_methods.conversion.stages import open_stages
from compress_methods.errors import OutputError, RecipeError
from compress_methods.model.device import AUTO, resolve_device
from compress_methods.recipe.schema import Recipe
from compress_methods.recipe.stages import StagedRecipe, load_staged
from compress_methods.recipe.training import Training
from compress_methods.search.gate import Gate
from compress_methods.search.prune_to import Opening, Search
from compress_methods.system.processes import count_of
from compress_methods.system.user_file import require_path
from compress_methods.training.processes import require_shared
from compress_methods.training.recover import recover as train_towards
from compress_methods.training.staged import Trained


def convert(
    model: str | Path,
    recipe: str | Path | Mapping[str, Any] | Recipe | StagedRecipe,
    out: str | Path,
    *,
    calibration: str | Path | Sequence[str | Path] | None = None,
    revision: str | None = None,
    allow_pickle: bool = False,
    tensor_parallel_size: int = 1,
    device: str = AUTO,
    dtype: torch.dtype = torch.float32,
    layout: str | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Compress `model` (directory or hub id) by `recipe` into `out`; returns the report.

    `revision` is a hub id's branch, tag or commit. `calibration`, instead of the recipe's, is
    a .txt, .jsonl or .parquet file, a list of them, or `self:PRESET`; without it, stages that need
    it get text sampled from the model itself. `device`: `auto`, `cpu` or `cuda:N`; `dtype`: of
    forward passes, float32 unless given. `layout`: of another tool, for a result in its form;
    `gguf` is one more file in a result of ours.
    Called in each of several processes that torchrun started, they share the work; all get the
    report.
    Raises a `CompressError` subclass for anything the user can fix; `out` then holds nothing, or
    finished units that the same call will continue from. `NotAccepted`, one of them, says that the
    result lost more than the recipe's `accept` allows; `out` is as it was.
    """
    require_path(out, OutputError)
    staged = load_staged(recipe)
    for _, training in staged.training:
        require_shared(training, count_of())
    if not staged.training:  # of which each segment is divided that can be
        require_divisible_recipe(staged, count_of())
    running = Running(resolve_device(device), dtype, quiet).joined()
    model = at_revision(model, revision)
    opening = (model, allow_pickle, tensor_parallel_size)
    beside = layout == GGUF
    written = OWN if layout is None or beside else LAYOUTS.get(layout, "layout", RecipeError)({})
    if beside:
        directory = resolve_model(model, allow_pickle)
        require_writable(directory, read_json(directory / "config.json"))
    report = _convert(staged, Path(out), calibration, opening, written, running, beside)
    if beside:
        running.processes.first(lambda: write_gguf(Path(out)))
    return report


def _convert(
    staged: StagedRecipe,
    out: Path,
    calibration: str | Path | Sequence[str | Path] | None,
    opening: Opening,
    written: Layout,
    running: Running,
    beside: bool,
) -> dict[str, Any]:
    """`beside`: formats have to have an equal in GGUF, too."""
    if staged.accept is not None:
        return Gate(staged, out, calibration, opening, written, running).run()
    if staged.training:
        return Trained(staged, out, calibration, opening, written, running).run()
    if staged.search is not None:
        return Search(staged, out, calibration, opening, running).run()
    stages = open_stages(opening[0], staged, *opening[1:], layout=written, quiet=running.quiet)
    if stages[-1].packs:
        plan = stages[-1].planned.plan
        if written is not OWN:
            written.config(plan.compression_spec("", __version__))  # or refuses
        for job in plan.jobs if beside else ():
            for fmt in (job.format, *job.choices):
                equal_of(job.slot.module, fmt)
    source = stages[0].planned.source
    text = check_calibration(source.directory, settings_of(stages), calibration)
    if staged.transforms and not running.quiet:
        print(statement(stages), file=sys.stderr, flush=True)
    return carry_out(staged, stages, out, text, running)


def import_checkpoint(
    model: str | Path,
    out: str | Path,
    *,
    inexact: str = REFUSE,
    revision: str | None = None,
    allow_pickle: bool = False,
    tensor_parallel_size: int = 1,
    quiet: bool = False,
) -> dict[str, Any]:
    """Re-pack `model`, which another tool quantized (directory, hub id or GGUF file), into `out`
    without loss; returns the report. `inexact`: what becomes of matrices that no format holds
    exactly: `refuse`, `bfloat16` (unpacked) or `int8` (rounded). Raises a `CompressError` subclass
    for anything the user can fix; the same call goes on from where a killed one was."""
    require_path(out, OutputError)
    model = at_revision(model, revision)
    recipe = import_recipe(model, inexact, tensor_parallel_size, allow_pickle)
    staged = load_staged(recipe)
    kept = inexact if inexact == UNPACK else None
    stages = open_stages(
        model, staged, allow_pickle, tensor_parallel_size, quiet=quiet, kept_dtype=kept
    )
    running = Running(resolve_device("cpu"), torch.float32, quiet)
    return carry_out(staged, stages, Path(out), Text(), running)


def recover(
    model: str | Path,
    teacher: str | Path,
    out: str | Path,
    settings: Training,
    *,
    device: str = AUTO,
    quiet: bool = False,
) -> dict[str, Any]:
    """Train `model`, compressed or pruned, towards its original `teacher` (directories or hub ids)
    into `out`; returns the report. Needs the extra `train`. Raises a `CompressError` subclass for
    anything the user can fix; the same call goes on from where a killed one was."""
    require_path(out, OutputError)
    running = Running(resolve_device(device), torch.float32, quiet)
    return train_towards(model, teacher, settings, Path(out), running)
