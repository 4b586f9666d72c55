"""A checkpoint, compressed or not, trained towards its original and written anew.

Files, names, shapes and formats of the result are those of the checkpoint; only values differ. The
held-out figures are measured on what was written, read again, on text that neither trained nor
stopped the training. In the output directory, as `conversion/journal.py` has it:

    .work/tokens.safetensors   text, where the teacher writes it
    .work/noted/               the teacher's predictions, with `top_k`
    .work/checkpoints/         of transformers' Trainer; a killed training goes on from the last
    .work/result/              what will be published

Needs both models in memory. Fails where: the two do not share a vocabulary, or their predictions
are not of the next token.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from compress_methods import __version__
from compress_methods.calibration.self_generated import sample_from_model
from compress_methods.calibration.tokenizer import check_length, check_vocabulary, load_tokenizer
from compress_methods.checkpoint.compressed import (
    INCOMPLETE,
    open_compressed,
    read_entries,
    read_json,
)
from compress_methods.checkpoint.integrity import REPORT, seal
from compress_methods.checkpoint.loading.model import is_compressed, load_model
from compress_methods.checkpoint.loading.tied import open_skeleton
from compress_methods.checkpoint.rewritten import write_changed
from compress_methods.checkpoint.source import (
    Source,
    fingerprint,
    name_of,
    open_source,
    resolve_model,
)
from compress_methods.conversion.job import TOKENS
from compress_methods.conversion.journal import WORK, Journal
from compress_methods.conversion.recovery import verified
from compress_methods.conversion.report import model_card
from compress_methods.conversion.running import Running
from compress_methods.errors import CheckpointError, RecipeError
from compress_methods.evaluation.metrics import Evaluation, Sums, compare_logits, summarize
from compress_methods.evaluation.offline import all_logits
from compress_methods.formats import Format
from compress_methods.model.device import peak_device_bytes
from compress_methods.model.task import NEXT_TOKEN
from compress_methods.recipe.training import Training
from compress_methods.search.publish import CARD, opened, publish
from compress_methods.system.files import finite, write_text
from compress_methods.system.memory import peak_bytes
from compress_methods.system.processes import count_here
from compress_methods.system.progress import Progress
from compress_methods.training.cost import Planned, require_memory
from compress_methods.training.lessons import COUNTED, Row
from compress_methods.training.lessons import TOKENS as INPUT
from compress_methods.training.material import Material, plain_rows, read_material
from compress_methods.training.noted import note_all
from compress_methods.training.processes import join
from compress_methods.training.student import Student, check_adapters

TRAINING, RESULT, CHECKPOINTS, NOTED = "training", "result", "checkpoints", "noted"


@dataclass(frozen=True)
class Pair:
    """A student's directory and its teacher's, that fit each other."""

    student: Source
    teacher: Source
    material: Material
    settings: Training
    running: Running

    @property
    def fingerprint(self) -> str:
        """Of everything the result depends on."""
        told = json.dumps(self.settings.to_dict(), sort_keys=True)
        parts = [TRAINING, fingerprint(self.student), fingerprint(self.teacher), told]
        parts += [
            self.material.text.identity or "model",
            *(__version__, self.running.signature),
        ]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def recover(
    model: str | Path, teacher: str | Path, settings: Training, out: Path, running: Running
) -> dict[str, Any]:
    """Train `model` towards `teacher` into `out`, or go on; returns the report."""
    require_trainer()
    running = join(settings, running)
    processes = running.processes
    pair = open_pair(model, teacher, settings, running)
    if not processes.leads:
        if processes.agree(False):
            _carry_out(pair, out / WORK)
        processes.wait()
        return read_json(out / REPORT)
    with opened(out, pair.fingerprint) as journal:
        found = None
        if journal.complete:
            found = verified(journal, pair.student.directory, None, running.quiet)
        made = RESULT in journal.finished and journal.holds(RESULT)
        if processes.agree(found is None and not made):
            _make(pair, journal)
        if found is None:
            found = publish(journal, RESULT, TRAINING, lambda report, _: report)
        processes.wait()
        return found


def open_pair(model: str | Path, teacher: str | Path, settings: Training, running: Running) -> Pair:
    """Both checkpoints and the text, checked before anything runs; a `CompressError` says what is
    wrong with them."""
    if running.device.index and running.processes.count == 1:
        raise RecipeError(
            f"training runs on the first GPU, not on {running.device}; choose it by "
            "CUDA_VISIBLE_DEVICES"
        )
    sources = [_open(model), _open(teacher)]
    (mine, theirs), names = sources, [source.directory for source in sources]
    tokenizers = [load_tokenizer(directory) for directory in names]
    check_vocabulary(tokenizers[1], tokenizers[0], names[1], names[0])
    sizes = [_vocabulary(directory) for directory in names]
    if sizes[0] != sizes[1]:
        raise CheckpointError(
            f"{names[0]}: predicts {sizes[0]} tokens, expected the {sizes[1]} of its teacher "
            f"{names[1]}"
        )
    if settings.top_k > sizes[1]:
        raise RecipeError(f"top_k is {settings.top_k}, expected at most the {sizes[1]} tokens")
    if open_skeleton(theirs.directory).architecture.loss != NEXT_TOKEN:
        raise CheckpointError(f"{names[1]}: does not predict the next token, so it cannot teach")
    if settings.lora:
        check_adapters(mine.directory, settings.lora)
    check_length(theirs.directory, settings.length)
    check_length(mine.directory, settings.length)
    if running.device.type == "cpu" and running.processes.leads:
        require_memory(_planned(mine, theirs, settings, running), f"training {mine.name}")
    material = read_material(theirs.directory, settings)
    return Pair(mine, theirs, material, settings, running)


def _planned(mine: Source, theirs: Source, settings: Training, running: Running) -> Planned:
    packed: list[tuple[Format, int, int]] = []
    if is_compressed(mine.directory):
        held = open_compressed(mine.directory).held.values()
        packed = [(matrix.format, matrix.rows, matrix.cols) for matrix in held]
    teacher, student = (open_skeleton(source.directory) for source in (theirs, mine))
    return Planned(settings, teacher, student, packed, running.processes.count, count_here())


def require_trainer() -> None:
    """`RecipeError` where the optional packages are not installed."""
    if find_spec("accelerate") is None:
        raise RecipeError("training needs accelerate; pip install 'vllm-compress[train]'")


def _open(model: str | Path) -> Source:
    directory = resolve_model(model)
    if (directory / INCOMPLETE).exists():
        raise CheckpointError(
            f"{directory}: is not finished ({INCOMPLETE} is there); run the command that makes it "
            "again to complete it"
        )
    return open_source(directory, open_skeleton(directory), name_of(model), allow_pickle=False)


def _vocabulary(directory: Path) -> Any:
    config = read_json(directory / "config.json")
    return config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")


@dataclass(frozen=True)
class Learned:
    """A student that was trained, its teacher (None where that had to go), the rows to report on,
    and how far from the teacher it was on them, which the first process knows."""

    student: Student
    teacher: Any
    outcome: Any
    reported: Sequence[Row]
    before: Evaluation | None


def learn(pair: Pair, work: Path) -> Learned:
    """Train in this process, and in the others."""
    from compress_methods.training.trainer import train  # seconds, and only to train

    settings, running, processes = pair.settings, pair.running, pair.running.processes
    with processes.in_turn():
        rows = _rows(pair, work)
    learnt = settings.sequences + settings.held_out
    reported = rows[learnt:]
    teacher = _loaded(pair, pair.teacher.directory)
    before = None
    if settings.shard:
        before = measure(teacher, _loaded(pair, pair.student.directory), reported)
    student = _student(pair)
    if processes.leads and before is None:
        before = measure(teacher, student.model, reported)
    if settings.top_k:
        rows = _noted(pair, teacher, rows[:learnt], work)
        teacher = None
    with Progress(settings.steps, f"training ({settings.train})", quiet=running.quiet) as progress:
        outcome = train(student, teacher, rows, settings, work / CHECKPOINTS, progress, running)
        if outcome.note:
            progress.say(outcome.note)
    return Learned(student, teacher, outcome, reported, before)


def _loaded(pair: Pair, directory: Path) -> Any:
    """A model to measure with."""
    if pair.settings.shard:
        from compress_methods.training.shards import load_divided  # seconds, and only for several

        return load_divided(directory, pair.running)
    return load_model(directory, torch.float32, pair.running.device)


def _student(pair: Pair) -> Student:
    settings, running, directory = pair.settings, pair.running, pair.student.directory
    if settings.shard:
        from compress_methods.training.shards import DividedStudent

        with running.processes.one_by_one():
            return DividedStudent(directory, settings.train, running, settings.lora, settings.seed)
    student = Student(
        directory, settings.train, running.device, pair.teacher, settings.lora, settings.seed
    )
    if settings.gradient_checkpointing:
        student.recompute()
    return student


@dataclass(frozen=True)
class Made:
    """What a training came to. `zeros`: how many values stayed zero."""

    outcome: Any
    zeros: int
    before: Evaluation
    after: Evaluation


def _carry_out(pair: Pair, work: Path) -> Made | None:
    """Train, write into the work folder and measure that; the first process has the figures."""
    learned, processes = learn(pair, work), pair.running.processes
    teacher, reported, place = learned.teacher, learned.reported, work / RESULT
    outcome, before = learned.outcome, learned.before
    changed, zeros = learned.student.stored(), sum(one.zeros for one in learned.student.pieces)
    del learned
    with processes.in_turn():
        if processes.leads:
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            write_changed(pair.student.directory, place, changed)
    del changed
    if not (processes.leads or pair.settings.shard):
        return None
    teacher = teacher or _loaded(pair, pair.teacher.directory)
    after = measure(teacher, _loaded(pair, place), reported)
    assert before is not None
    return Made(outcome, zeros, before, after)


def _make(pair: Pair, journal: Journal) -> None:
    """Train, write and measure; the result is then in the work folder, and journaled."""
    began, settings, place = time.monotonic(), pair.settings, journal.work / RESULT
    made = _carry_out(pair, journal.work)
    assert made is not None
    outcome = made.outcome
    facts = finite(
        {
            **settings.to_dict(),
            "teacher": pair.teacher.name,
            "text": pair.material.text.source,
            "best": outcome.best,
            "loss_curve": [list(point) for point in outcome.loss],
            "held_out_curve": [list(point) for point in outcome.kl],
            "zeros_kept": made.zeros,
            "note": outcome.note,
            "before": made.before.to_dict(),
            "held_out": made.after.to_dict(),
        }
    )
    seconds = time.monotonic() - began
    report = _reported(pair, facts, seconds) | {"fingerprint": journal.fingerprint}
    write_text(place / CARD, model_card(report))
    write_text(place / REPORT, json.dumps(seal(report, place), indent=2) + "\n")
    journal.record(RESULT, f"{place.relative_to(journal.directory)}/{REPORT}", {})


def _reported(pair: Pair, facts: dict[str, Any], seconds: float) -> dict[str, Any]:
    """The student's report, with what this training did."""
    device, report = pair.running.device, _report_of(pair)
    run = {
        "seconds": seconds,
        "peak_memory_bytes": peak_bytes(),
        "device": pair.running.signature,
        "peak_device_bytes": peak_device_bytes(device),
        "bytes_per_second": None,
        "tool_version": __version__,
    }
    return {
        **report,
        TRAINING: [*report.get(TRAINING, ()), facts],
        "stages": [*report.get("stages", ()), _stage(facts, report)],
        "held_out": facts["held_out"],
        "held_out_halves": [],
        "run": run,
    }


def _rows(pair: Pair, work: Path) -> list[Row]:
    """What is learnt from, judged by and reported on; the teacher writes it where it is to."""
    if pair.material.rows is not None:
        return pair.material.rows
    settings = dataclasses.replace(pair.settings.text, preset=pair.material.text.preset)
    tokenizer = load_tokenizer(pair.teacher.directory)
    with Progress(1, "the teacher writes text", quiet=pair.running.quiet) as progress:
        tokens = sample_from_model(
            pair.teacher, tokenizer, settings, progress, work / TOKENS, pair.running.device
        )
    return plain_rows(tokens)


def _noted(pair: Pair, teacher: Any, rows: list[Row], work: Path) -> list[Row]:
    """The rows with what the teacher says of them, in the work folder."""
    settings, quiet = pair.settings, pair.running.quiet
    with Progress(len(rows), "the teacher writes its predictions down", quiet=quiet) as progress:
        return note_all(
            *(teacher, rows, settings.top_k, settings.batch),
            *(work / NOTED, progress, pair.running.processes),
        )


def measure(teacher: Any, model: Any, rows: Sequence[Row]) -> Evaluation:
    """How far a model in memory is from its teacher, on all tokens of rows or those that count."""
    sums: list[Sums] = []
    for row in rows:
        tokens = row[INPUT]
        counted = row.get(COUNTED, torch.ones_like(tokens, dtype=torch.bool))[1:]
        expected, found = (all_logits(one, tokens)[:-1][counted] for one in (teacher, model))
        sums.append(compare_logits(expected, found, tokens[1:][counted]))
    return summarize(sums)


def _report_of(pair: Pair) -> dict[str, Any]:
    """What is known of the student: its own report, or of a plain checkpoint what its files say."""
    directory = pair.student.directory
    if (directory / REPORT).exists():
        return read_json(directory / REPORT)
    weights = sum(math.prod(entry.shape) for entry in pair.student.held)
    size = sum(entry.nbytes for entry in read_entries(directory).values())
    before = pair.teacher.nbytes
    return {
        "base_model": pair.teacher.name,
        "recipe": {"name": pair.settings.train, **pair.settings.to_dict()},
        "bytes_before": before,
        "bytes_after": size,
        "original_parameters": sum(math.prod(entry.shape) for entry in pair.teacher.held),
        "bits_per_weight": 8 * size / weights,
        "compressed_bits_per_weight": None,
        "parameters": weights,
        "modules": {},
        "kept": size,
        "dense": {},
        "dropped": {},
        "calibration": None,
    }


def _stage(facts: Mapping[str, Any], report: Mapping[str, Any]) -> dict[str, Any]:
    """The training among the report's stages."""
    size = report["bytes_after"]
    return {
        "stage": f"train {facts['train']}",
        "settings": {key: facts[key] for key in ("loss", "steps", "rate", "data", "best")},
        "changes": {},
        "bytes_before": size,
        "bytes_after": size,
        "held_out": facts["held_out"],
    }
