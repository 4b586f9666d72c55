"""A whole comparison: check everything that can be wrong, replay, score, judge, write reports.

Prompts, margins and the scorer are read before any server is asked, and both servers before any
prompt is sent. report.json and report.html are written when all is measured, each in one step.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from compress_methods.evaluate_served import ServerError
from compress_methods.files import write_text
from compress_methods.progress import Progress
from vllm_compress.abtest import report
from vllm_compress.abtest.client import Server, open_server
from vllm_compress.abtest.harness import Task, measure_tasks, missing, read_tasks, run_tasks
from vllm_compress.abtest.journal import Journal
from vllm_compress.abtest.measure import measure, read_pairs
from vllm_compress.abtest.metrics import limits
from vllm_compress.abtest.page import page
from vllm_compress.abtest.prompts import Prompt, digest, read_prompts
from vllm_compress.abtest.replay import ANSWERS, SCORES, Options, Pair, replay, score
from vllm_compress.abtest.scores import load_scorer

SERVERS = "servers"
REPORT_JSON, REPORT_HTML = "report.json", "report.html"


@dataclass(frozen=True)
class Plan:
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
    confidence: float = 0.95
    options: Options = field(default_factory=Options)
    quiet: bool = False


def compare(plan: Plan) -> dict[str, Any]:
    """Run or continue a comparison; what report.json holds. Raises a `CompressError`."""
    judged = limits(plan.margins)
    prompts = read_prompts(plan.prompts, plan.max_tokens)
    scorer = load_scorer(plan.scorer) if plan.scorer else None
    tasks = read_tasks(plan.lm_eval)
    with Journal(plan.out, fingerprint(prompts, plan)) as journal:
        pair = _servers(plan, prompts, tasks, journal)
        _ask(pair, prompts, tasks, plan, journal)
        pairs = read_pairs(prompts, journal.records, scorer)
        lines = journal.records[ANSWERS].values()
        measured = measure(pairs, pair, plan.options, plan.confidence)
        measured += measure_tasks(tasks, journal.records, plan.confidence)
        comparison = report.Comparison(
            servers=pair,
            pairs=pairs,
            measured=measured,
            limits=judged,
            options=plan.options,
            confidence=plan.confidence,
            prompts=plan.prompts.name,
            late=sum(line["late"] for line in lines),
        )
        result = report.build(comparison)
        write_text(plan.out / REPORT_JSON, json.dumps(result, indent=2) + "\n")
        write_text(plan.out / REPORT_HTML, page(result, pairs))
    return result


def fingerprint(prompts: list[Prompt], plan: Plan) -> str:
    """Of all the user says that decides what is measured."""
    options = plan.options
    dials = [options.rate, options.concurrency, options.logprobs, options.seed]
    every = [plan.urls, plan.models, digest(prompts), dials]
    return hashlib.sha256(json.dumps(every).encode()).hexdigest()


def _servers(plan: Plan, prompts: list[Prompt], tasks: list[Task], journal: Journal) -> Pair:
    """Both servers, with the user's prices: as they were when the comparison began, and checked to
    serve the same still if there is anything left to ask them."""
    phases = [ANSWERS, SCORES] if plan.options.logprobs else [ANSWERS]
    noted = {side: Server(**facts) for side, facts in journal.notes.get(SERVERS, {}).items()}
    left = any(len(journal.records.get(phase, {})) < len(prompts) for phase in phases)
    if not noted or left or missing(tasks, journal):
        for side, url, model in zip("ab", plan.urls, plan.models, strict=True):
            found = open_server(side, url, model)
            if not found.same_model(noted.setdefault(side, found)):
                raise ServerError(
                    f"{url}: no longer serves what this comparison began with "
                    f"({noted[side].root}, now {found.root}); choose another directory with -o"
                )
        if not journal.notes:
            journal.note(**{SERVERS: {side: asdict(server) for side, server in noted.items()}})
    prices = dict(zip("ab", plan.prices, strict=True))
    a, b = (
        replace(noted[side], price_per_hour=prices[side] or noted[side].price_per_hour)
        for side in "ab"
    )
    return a, b


def _ask(
    pair: Pair, prompts: list[Prompt], tasks: list[Task], plan: Plan, journal: Journal
) -> None:
    """Everything that is not in the journal yet; raises `ServerError` or `HarnessError`."""

    def progress(total: int, label: str) -> Progress:
        return Progress(total, label, sys.stderr, quiet=plan.quiet)

    try:
        with progress(len(prompts), "replaying") as line:
            replay(pair, prompts, plan.options, journal, line)
        if plan.options.logprobs:
            with progress(len(prompts), "scoring") as line:
                score(pair, prompts, plan.options, journal, line)
        if tasks:
            with progress(2 * len(tasks), "lm-eval") as line:
                run_tasks(pair, tasks, journal, line)
    except ServerError as problem:
        done = len(journal.records.get(ANSWERS, {}))
        if not done:
            raise
        raise ServerError(
            f"{problem}; {done} of {len(prompts)} prompts are kept in {plan.out}, "
            "the same command continues"
        ) from problem
