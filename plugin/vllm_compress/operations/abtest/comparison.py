"""A whole comparison: check everything that can be wrong, replay, score, judge, write reports.

Every verdict on grown data is another look, and looks until one pleases would find anything. So a
comparison knows how often it was looked at: the k-th look spends 2^-k of the error that is allowed
(1 - --confidence), and all together never spend more (alpha spending; Lan and DeMets, Biometrika
70, 1983).
Prompts appended to the file, and the same command, are the next look at the same comparison; the
margins and prices of an old look may be changed freely, as nothing new is seen.

Prompts, margins and the scorer are read before any server is asked, and both servers before any
prompt is sent. report.json and report.html are written when all is measured, each in one step.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from compress_methods.errors import OutputError
from compress_methods.evaluation.served import ServerError
from compress_methods.system.files import write_text
from compress_methods.system.progress import Progress
from vllm_compress.operations.abtest.harness import (
    Task,
    measure_tasks,
    missing,
    read_tasks,
    run_tasks,
)
from vllm_compress.operations.abtest.metrics import read_limits
from vllm_compress.operations.abtest.probes.files import Probes, read_probes
from vllm_compress.operations.abtest.probes.run import (
    measure_probes,
    missing_probes,
    run_probes,
)
from vllm_compress.operations.abtest.probes.summary import summarize
from vllm_compress.operations.abtest.replay.client import Server, open_server
from vllm_compress.operations.abtest.replay.energy import EnergyLog, measure_energy
from vllm_compress.operations.abtest.replay.measure import measure_metrics, read_pairs
from vllm_compress.operations.abtest.replay.prompts import Prompt, digest_prompts, read_prompts
from vllm_compress.operations.abtest.replay.replay import (
    ANSWERS,
    SCORES,
    Batch,
    Options,
    Pair,
    replay,
    score,
)
from vllm_compress.operations.abtest.report import document
from vllm_compress.operations.abtest.report.page import page
from vllm_compress.operations.abtest.scoring.scores import load_scorer
from vllm_compress.operations.journal import Journal

SERVERS, PROMPTS, LOOKS = "servers", "prompts", "looks"
REPORT_JSON, REPORT_HTML = "report.json", "report.html"


@dataclass(frozen=True)
class ComparisonSettings:
    """What the user asks for. `urls`, `models` and `prices` are of A and of B."""

    urls: tuple[str, str]
    prompts: Path
    out: Path
    models: tuple[str | None, str | None] = (None, None)
    prices: tuple[float | None, float | None] = (None, None)
    max_tokens: int = 64
    margins: Sequence[str] = ()
    scorer: str | None = None
    lm_eval: str | None = None
    probes: str | None = None
    confidence: float = 0.95
    options: Options = field(default_factory=Options)
    quiet: bool = False


def compare(settings: ComparisonSettings) -> dict[str, Any]:
    """Run or continue a comparison; return what report.json holds. Raises a `CompressError`."""
    judged = read_limits(settings.margins)
    prompts = read_prompts(settings.prompts, settings.max_tokens)
    scorer = load_scorer(settings.scorer) if settings.scorer else None
    tasks = read_tasks(settings.lm_eval)
    probes = read_probes(settings.probes)
    with Journal(settings.out, digest_comparison(settings)) as journal:
        _check_prompts(prompts, journal)
        pair = _servers(settings, prompts, bool(missing(tasks, journal)), probes, journal)
        _measure_missing(pair, prompts, tasks, probes, settings, journal)
        pairs = read_pairs(prompts, journal.records, scorer)
        lines = journal.records[ANSWERS].values()
        look = _look(prompts, journal)
        confidence = spent_confidence(settings.confidence, look)
        measured = measure_metrics(pairs, pair, settings.options, confidence)
        measured += measure_energy(pair, journal.records, confidence)
        measured += measure_tasks(tasks, journal.records, confidence)
        measured += measure_probes(probes, journal.records, confidence)
        comparison = document.Comparison(
            servers=pair,
            pairs=pairs,
            measured=measured,
            limits=judged,
            options=settings.options,
            confidence=confidence,
            next_confidence=spent_confidence(settings.confidence, look + 1),
            look=look,
            prompts=settings.prompts.name,
            late=sum(line["late"] for line in lines),
            probes=summarize(probes, journal.records),
        )
        result = document.build(comparison)
        write_text(settings.out / REPORT_JSON, json.dumps(result, indent=2) + "\n")
        write_text(settings.out / REPORT_HTML, page(result, pairs))
    return result


def spent_confidence(confidence: float, look: int) -> float:
    """The confidence of the intervals of a look, the first being 1."""
    return 1 - (1 - confidence) / 2**look


def _check_prompts(prompts: list[Prompt], journal: Journal) -> None:
    """Raise `OutputError` unless the prompts begin with those noted before."""
    seen = journal.notes.get(PROMPTS)
    if seen is not None and _sent(prompts[: seen[0]]) != seen:
        raise OutputError(
            f"{journal.directory}: holds a comparison of other prompts; append to them, choose "
            "another directory with -o or delete this one"
        )


def _sent(prompts: list[Prompt]) -> list[Any]:
    return [len(prompts), digest_prompts(prompts)]


def _look(prompts: list[Prompt], journal: Journal) -> int:
    """Count how often a verdict was made on ever more prompts, this time included."""
    looks = list(journal.notes.get(LOOKS, []))
    if len(prompts) not in looks:
        looks.append(len(prompts))
        journal.note(**{LOOKS: looks})
    return looks.index(len(prompts)) + 1


def digest_comparison(settings: ComparisonSettings) -> str:
    """Hash all that the user says and that decides how prompts are measured."""
    options = settings.options
    dials = [options.rate, options.concurrency, options.logprobs, options.seed]
    every = [settings.urls, settings.models, dials]
    return hashlib.sha256(json.dumps(every).encode()).hexdigest()


def _servers(
    settings: ComparisonSettings,
    prompts: list[Prompt],
    tasks_left: bool,
    probes: Probes,
    journal: Journal,
) -> Pair:
    """Both servers, with the user's prices: as they were when the comparison began, and checked to
    serve the same still if there is anything left to ask them."""
    phases = [ANSWERS, SCORES] if settings.options.logprobs else [ANSWERS]
    noted = {side: Server(**facts) for side, facts in journal.notes.get(SERVERS, {}).items()}
    left = any(len(journal.records.get(phase, {})) < len(prompts) for phase in phases)
    if not noted or left or tasks_left or missing_probes(probes, journal):
        for side, url, model in zip("ab", settings.urls, settings.models, strict=True):
            found = open_server(side, url, model)
            if not found.same_model(noted.setdefault(side, found)):
                raise ServerError(
                    f"{url}: no longer serves what this comparison began with "
                    f"({noted[side].root}, now {found.root}); choose another directory with -o"
                )
        if SERVERS not in journal.notes:
            sides = {side: asdict(server) for side, server in noted.items()}
            journal.note(**{SERVERS: sides, PROMPTS: _sent(prompts)})
    if journal.notes[PROMPTS] != _sent(prompts):
        journal.note(**{PROMPTS: _sent(prompts)})
    prices = dict(zip("ab", settings.prices, strict=True))
    a, b = (
        replace(noted[side], price_per_hour=prices[side] or noted[side].price_per_hour)
        for side in "ab"
    )
    return a, b


def _measure_missing(
    pair: Pair,
    prompts: list[Prompt],
    tasks: list[Task],
    probes: Probes,
    settings: ComparisonSettings,
    journal: Journal,
) -> None:
    """Measure what is not in the journal yet; raises `ServerError` or `HarnessError`."""

    def progress(total: int, label: str) -> Progress:
        return Progress(total, label, sys.stderr, quiet=settings.quiet)

    try:
        unanswered = len(journal.records.get(ANSWERS, {})) < len(prompts)
        energy = EnergyLog(pair, journal) if unanswered else nullcontext()
        with progress(len(prompts), "replaying") as line, energy:
            replay(pair, Batch(prompts), settings.options, journal, line)
        if settings.options.logprobs:
            with progress(len(prompts), "scoring") as line:
                score(pair, prompts, settings.options, journal, line)
        if probes.kinds:
            with progress(len(probes.asked) + len(probes.choices), "probing") as line:
                run_probes(pair, probes, settings.options, journal, line)
        if tasks:
            with progress(2 * len(tasks), "lm-eval") as line:
                run_tasks(pair, tasks, journal, line)
    except ServerError as problem:
        done = len(journal.records.get(ANSWERS, {}))
        if not done:
            raise
        raise ServerError(
            f"{problem}; {done} of {len(prompts)} prompts are kept in {settings.out}, "
            "the same command continues"
        ) from problem
