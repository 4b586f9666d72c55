"""Recipes with `train` stages: conversions and trainings one after another.

Each segment of the recipe, a training or the stages between two, makes a whole directory of its own
in `.work/segment-N`, journaled and verified like a conversion, and read by the next; the last one
moves into OUT. The teacher is always the original. All conversions see the same calibration text,
and what the result loses is measured against the original.

Several processes that torchrun has started carry out a training as they do `recover`, a packing as
they do `convert`; what those cannot share (transforms, `refine`, budgets) the first one does alone,
as it would without the others. It has the directory and its journal.

Fails where: the original and a result do not fit into memory together.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress_methods.checkpoint.integrity import find_damaged
from compress_methods.checkpoint.interchange import Layout
from compress_methods.checkpoint.interchange.own import OWN
from compress_methods.checkpoint.loading.model import load_model
from compress_methods.conversion.job import (
    TOKENS,
    Text,
    carry_out,
    check_calibration,
    job_fingerprint,
    needs_calibration,
    require_same,
    sample_tokens,
    statement,
)
from compress_methods.conversion.journal import REPORT, WORK, Journal
from compress_methods.conversion.passes.divisible import is_divisible
from compress_methods.conversion.planning.calibration import settings_of
from compress_methods.conversion.recovery import verified
from compress_methods.conversion.running import Running
from compress_methods.conversion.stages import PACKING, open_stages
from compress_methods.errors import RecipeError
from compress_methods.recipe.stages import StagedRecipe
from compress_methods.recipe.training import Training
from compress_methods.search.prune_to import Opening
from compress_methods.search.publish import Report, opened, publish
from compress_methods.system.processes import Processes
from compress_methods.training.material import plain_rows, read_material
from compress_methods.training.recover import TRAINING, measure, recover, require_trainer

SEGMENTS, STAGES = "segments", "stages"
MEASURED = ("bytes_before", "bytes_after", "held_out")
TOLD = (STAGES, TRAINING, "dropped", *MEASURED)
"""Keys of a segment's report that the result's report speaks of."""


class Trained:
    """One recipe with training, in `out`."""

    def __init__(
        self,
        recipe: StagedRecipe,
        out: Path,
        calibration: str | Path | Sequence[str | Path] | None,
        opening: Opening,
        layout: Layout,
        running: Running,
    ) -> None:
        require_trainer()
        if layout is not OWN:
            raise RecipeError(f"recipe {recipe.name!r}: cannot train the layout {layout.name!r}")
        self.out, self.opening, self.running = out, opening, running
        model, pickles, ways = opening
        self.stages = open_stages(model, recipe, pickles, ways, quiet=running.quiet)
        self.source = self.stages[0].planned.source
        settings = settings_of(self.stages)
        self.recipe = recipe.calibrated(settings)
        self.text = check_calibration(self.source.directory, settings, calibration)
        self.identities = [
            read_material(self.source.directory, training).text.identity
            for _, training in recipe.training
        ]

    def run(self) -> Report:
        """Carry out, or go on; returns the report."""
        if not self.running.quiet:
            print(statement(self.stages), file=sys.stderr, flush=True)
        processes, identity = self.running.processes, self._fingerprint()
        require_same(processes.gathered(identity))
        with opened(self.out, identity, processes) as journal:
            if journal.complete:
                found = processes.first(
                    lambda: verified(journal, self.source.directory, None, self.running.quiet)
                )
                if found is not None:
                    return found
                journal.tell()
            if self.text.tokens is None and (self.text.asked or needs_calibration(self.stages)):
                self.text = replace(
                    self.text, tokens=processes.first(partial(self._sample, journal))
                )
            if processes.leads:
                self._forget_damaged(journal)
            journal.tell()
            for number in range(self._count):
                self._segment(journal, number)
            last = self._name(self._count - 1)
            told = [journal.finished[self._name(i)]["told"] for i in range(self._count)]
            return processes.first(
                lambda: publish(journal, last, SEGMENTS, lambda r, at: self._amended(r, at, told))
            )

    def _sample(self, journal: Journal) -> Tensor:
        """Text that the original writes."""
        return sample_tokens(self.stages, journal.work / TOKENS, self.running, self.text.preset)

    @property
    def _count(self) -> int:
        return len(self.recipe.segments)

    def _name(self, number: int) -> str:
        """Where a segment is made. Its folder has the original's name, which results quote."""
        return f"segment-{number + 1}/{self.source.name}"

    def _fingerprint(self) -> str:
        parts = [job_fingerprint(self.recipe, self.stages, self.text, self.running)]
        return hashlib.sha256("\n".join([*parts, *self.identities]).encode()).hexdigest()

    def _forget_damaged(self, journal: Journal) -> None:
        """Begin anew where the last segment that is done is not as it was written."""
        done = [i for i in range(self._count) if self._name(i) in journal.finished]
        if not done or done[-1] == self._count - 1:
            return
        if find_damaged(journal.work / self._name(done[-1])):
            journal.forget(map(self._name, done))
            for place in journal.work.glob("segment-*"):
                shutil.rmtree(place)

    def _segment(self, journal: Journal, number: int) -> None:
        """One training or conversion, from what the last one left."""
        name = self._name(number)
        if name in journal.finished:
            return
        place = journal.work / name
        place.parent.mkdir(exist_ok=True)
        before = journal.work / self._name(number - 1) if number else self.opening[0]
        segment = self.recipe.segments[number]
        if isinstance(segment, Training):
            report = recover(before, self.source.directory, segment, place, self.running)
        else:
            report = self._convert(segment, before, place)
        told = {key: report[key] for key in TOLD if key in report}
        journal.record(name, f"{WORK}/{name}/{REPORT}", {"told": told})
        if number and self.running.processes.leads:
            shutil.rmtree(Path(before).parent, ignore_errors=True)

    def _convert(self, segment: StagedRecipe, before: str | Path, place: Path) -> Report:
        """By all processes where they can share it, else by the first."""
        running, processes = self.running, self.running.processes
        stages = open_stages(before, segment, *self.opening[1:], quiet=running.quiet)
        text = Text() if segment.starts_anew else self.text
        runs_text = text.asked or needs_calibration(stages)
        if is_divisible(segment, stages[-1].planned, runs_text, processes.count):
            return carry_out(segment, stages, place, text, running)
        alone = replace(running, processes=Processes())
        return processes.first(lambda: carry_out(segment, stages, place, text, alone))

    def _amended(self, report: Report, place: Path, told: Sequence[Mapping[str, Any]]) -> Report:
        """The last segment's report, speaking of the whole recipe."""
        recipe, segments = self.recipe, self.recipe.segments
        trains = [isinstance(segment, Training) for segment in segments]
        stages: list[Any] = []
        for one, trained in zip(told, trains, strict=True):
            # That of a training begins with what the report it started from said.
            plain = {"stage": PACKING, **{key: one[key] for key in MEASURED}}
            stages += one[STAGES][-1:] if trained else one.get(STAGES, [plain])
        found = {
            **report,
            "recipe": {"name": recipe.name, "sha256": recipe.sha256, **recipe.to_dict()},
            "bytes_before": self.source.nbytes,
            "original_parameters": sum(math.prod(entry.shape) for entry in self.source.held),
            "dropped": {name: why for one in told for name, why in one["dropped"].items()},
            STAGES: stages,
            TRAINING: [one[TRAINING][-1] for one, t in zip(told, trains, strict=True) if t],
            SEGMENTS: len(segments),
        }
        if not trains[-1] and self.text.tokens is not None:
            held = self.text.tokens[recipe.calibration.samples :]
            if len(held):
                device = self.running.device
                base = load_model(self.source.directory, torch.float32, device)
                result = load_model(place, torch.float32, device)
                found |= {
                    "held_out": measure(base, result, plain_rows(held)).to_dict(),
                    "held_out_halves": [],
                }
        return found
