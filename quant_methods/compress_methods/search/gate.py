"""accept and fallback: nothing is published that loses more than the recipe allows.

The recipe's result is made in `.work/try-1`, a whole directory of its own, and held against every
bound of `accept`: held-out text and, for `task`, questions that original and result answer. If all
are kept, it moves into OUT; else it is deleted and the next recipe of `fallback` is tried. All are
calibrated on the same text and measured on the same other one. What is decided is decided on 95%
intervals (see `verdict.py`), so too little text publishes nothing.

    .work/try-2/       the conversion by the first fallback, itself journaled
    .work/task.json    what the original scored in the task

A try is journaled when it is judged: a gate that was killed goes on inside the try it was at. Where
no recipe is accepted, OUT is left as it was found and `NotAccepted` says why. OUT is never whole
before something was accepted: `.incomplete` lies in it.

Fails where: text does not run block by block through the model (Gemma-3n).
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from compress_methods.calibration.text import describe_file
from compress_methods.checkpoint.compressed import read_json
from compress_methods.checkpoint.interchange import Layout
from compress_methods.conversion.job import (
    TOKENS,
    Text,
    carry_out,
    check_calibration,
    job_fingerprint,
    needs_calibration,
    sample_tokens,
)
from compress_methods.conversion.journal import REPORT, WORK, Journal, sha256
from compress_methods.conversion.planning.calibration import settings_of
from compress_methods.conversion.recovery import verified
from compress_methods.conversion.resources import require_room, stages_disk
from compress_methods.conversion.running import Running
from compress_methods.conversion.stages import Stage, open_stages
from compress_methods.errors import NotAccepted
from compress_methods.evaluation import tasks
from compress_methods.evaluation.outputs.judge import require_tokens
from compress_methods.evaluation.tasks import Scores, TaskResult
from compress_methods.recipe.stages import StagedRecipe
from compress_methods.search.prune_to import Opening, Search
from compress_methods.search.publish import Report, opened, publish
from compress_methods.search.verdict import WITHIN, costliest, judge
from compress_methods.system.files import write_text
from compress_methods.system.progress import Progress

GATE, TASK = "gate", "task.json"


class Candidate:
    """One recipe, planned before anything runs."""

    def __init__(
        self, recipe: StagedRecipe, opening: Opening, layout: Layout, running: Running
    ) -> None:
        self.recipe, self.opening, self.running = recipe, opening, running
        self.search: Search | None = None
        if recipe.search is not None:
            self.search = Search(recipe, Path(), None, opening, running)
            self.stages: list[Stage] = self.search.stages
        else:
            self.stages = open_stages(
                opening[0], recipe, *opening[1:], layout=layout, quiet=running.quiet
            )

    @property
    def disk(self) -> int:
        """Bytes at the fullest; a search holds two results."""
        planned = [stage.planned for stage in self.stages]
        beside = self.stages[-1].planned.plan.compressed_bytes if self.search else 0
        return stages_disk(planned, True) + beside

    def convert(self, place: Path, text: Text) -> dict[str, Any]:
        """Convert into `place`, or go on; returns the report."""
        if self.search is None:
            return carry_out(self.recipe, self.stages, place, text, self.running)
        self.search.out, self.search.text = place, text
        return self.search.run()


class Gate:
    """One recipe with `accept`, in `out`."""

    def __init__(
        self,
        recipe: StagedRecipe,
        out: Path,
        calibration: str | Path | Sequence[str | Path] | None,
        opening: Opening,
        layout: Layout,
        running: Running,
    ) -> None:
        assert recipe.accept is not None
        self.recipe, self.accept = recipe, recipe.accept
        self.out, self.running, self.pickles = out, running, opening[1]
        self.task = None if self.accept.task is None else Path(self.accept.task.file)
        if self.task is not None:
            tasks.require_task(self.task)
        found = (Candidate(one, opening, layout, running) for one in recipe.candidates)
        self.candidates = list(found)
        self.source = self.candidates[0].stages[0].planned.source
        require_tokens(self.candidates[0].stages[0].planned.skeleton, "accept")
        settings = settings_of(self.candidates[0].stages)
        self.text = check_calibration(self.source.directory, settings, calibration)

    def run(self) -> dict[str, Any]:
        """Try, or go on trying; returns the report of what is accepted, raises `NotAccepted`."""
        require_room(max(candidate.disk for candidate in self.candidates), self.out)
        with opened(self.out, self._fingerprint()) as journal:
            if journal.complete:
                quiet = self.running.quiet
                found = verified(journal, self.source.directory, None, quiet)
                if found is not None:
                    return found
            self._sample(journal)
            tries: list[dict[str, Any]] = []
            for number, candidate in enumerate(self.candidates, 1):
                name = f"try-{number}"
                tries.append(self._try(journal, name, candidate))
                if tries[-1]["accepted"]:
                    return publish(journal, name, GATE, self._told(tries))
                shutil.rmtree(journal.work / name, ignore_errors=True)
            journal.discard()
            said = "; ".join(f"{tried['recipe']}: {tried['said']}" for tried in tries)
            raise NotAccepted(f"{self.out}: nothing published; {said}", tries)

    def _told(self, tries: list[dict[str, Any]]) -> Callable[[Report, Path], Report]:
        """What adds the gate to the report of its result."""
        gate = {"recipe": self.recipe.name, "accept": self._bounds(), "tries": tries}
        return lambda report, _: {**report, GATE: gate}

    def _fingerprint(self) -> str:
        """Of all that the verdicts and the result depend on."""
        parts = [
            job_fingerprint(one.recipe, one.stages, self.text, self.running)
            for one in self.candidates
        ]
        parts.append(json.dumps(self._bounds(), sort_keys=True))
        parts += [] if self.task is None else [sha256(self.task)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def _bounds(self) -> dict[str, Any]:
        """The bounds as reports hold them: of a file its name and checksum, not where it lies."""
        found = self.accept.to_dict()
        if self.task is not None:
            found["task"] = {**found["task"], "file": describe_file(self.task)}
        return found

    def _sample(self, journal: Journal) -> None:
        """Have the original write the text, where text is needed and none is given."""
        stages = [candidate.stages for candidate in self.candidates]
        wanted = self.accept.reads_text or any(map(needs_calibration, stages))
        if wanted and self.text.tokens is None:
            kept = journal.work / TOKENS
            tokens = sample_tokens(stages[0], kept, self.running, self.text.preset)
            self.text = replace(self.text, tokens=tokens)

    def _try(self, journal: Journal, name: str, candidate: Candidate) -> dict[str, Any]:
        """Convert and judge, unless the journal knows the verdict."""
        if name not in journal.finished:
            place = journal.work / name
            report = candidate.convert(place, self.text)
            results = self._ask(journal, place)
            verdicts = judge(self.accept, report["held_out"], results)
            accepted = all(verdict.state == WITHIN for verdict in verdicts)
            lines = [v.line() for v in verdicts if accepted or v.state != WITHIN]
            layers = costliest(report["modules"])
            tried = {
                "recipe": candidate.recipe.name,
                "accepted": accepted,
                "bytes": report["bytes_after"],
                "bounds": [verdict.to_dict() for verdict in verdicts],
                "held_out": report["held_out"],
                "tasks": [result.to_dict() for result in results],
                "layers": layers,
                "said": ", ".join([*lines, *([layers] if layers and not accepted else [])]),
            }
            journal.record(name, f"{WORK}/{name}/{REPORT}", {"tried": tried})
            verdict = "accepted" if accepted else "not accepted"
            self._say(f"{tried['recipe']}: {verdict}: {tried['said']}")
        tried = journal.finished[name]["tried"]
        return dict(tried)

    def _ask(self, journal: Journal, place: Path) -> list[TaskResult]:
        """Both models' answers to the task, where there is one."""
        if self.task is None:
            return []
        if TASK not in journal.finished or not journal.holds(TASK):
            base = self._score(self.source.directory, "original")
            write_text(journal.work / TASK, json.dumps(base))
            journal.record(TASK, f"{WORK}/{TASK}", {})
        known: Mapping[str, Any] = read_json(journal.work / TASK)
        return tasks.compare(self.task, known, self._score(place, "result"))

    def _score(self, model: Path, label: str) -> Scores:
        assert self.task is not None
        device, dtype, quiet = self.running.device, self.running.dtype, self.running.quiet
        base = self.source.directory
        with Progress(1, f"{label} answers {self.task.name}", quiet=quiet) as progress:
            return tasks.score(
                self.task, model, base, device, dtype, progress, allow_pickle=self.pickles
            )

    def _say(self, line: str) -> None:
        if not self.running.quiet:
            print(line, file=sys.stderr, flush=True)
