"""A whole comparison: check everything that can be wrong, replay, score, judge, write reports.

Prompts, margins and the scorer are read before any server is asked, and both servers before any
prompt is sent. report.json and report.html are written when all is measured, each in one step.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compress_methods.evaluate_served import ServerError
from compress_methods.files import write_text
from compress_methods.progress import Progress
from vllm_compress.abtest import report
from vllm_compress.abtest.client import Server, open_server
from vllm_compress.abtest.journal import Journal
from vllm_compress.abtest.measure import measure, read_pairs
from vllm_compress.abtest.metrics import limits
from vllm_compress.abtest.prompts import Prompt, digest, read_prompts
from vllm_compress.abtest.replay import ANSWERS, Options, Pair, replay, score
from vllm_compress.abtest.scores import load_scorer

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
    confidence: float = 0.95
    options: Options = field(default_factory=Options)
    quiet: bool = False


def compare(plan: Plan) -> dict[str, Any]:
    """Run or continue a comparison; what report.json holds. Raises a `CompressError`."""
    judged = limits(plan.margins)
    prompts = read_prompts(plan.prompts, plan.max_tokens)
    scorer = load_scorer(plan.scorer) if plan.scorer else None
    a, b = (
        open_server(side, url, model, price)
        for side, url, model, price in zip("ab", plan.urls, plan.models, plan.prices, strict=True)
    )
    with Journal(plan.out, fingerprint((a, b), prompts, plan.options)) as journal:
        try:
            _replay((a, b), prompts, plan, journal)
        except ServerError as problem:
            done = len(journal.records.get(ANSWERS, {}))
            raise ServerError(
                f"{problem}; {done} of {len(prompts)} prompts are kept in {plan.out}, "
                "the same command continues"
            ) from problem
        pairs = read_pairs(prompts, journal.records, scorer)
        lines = journal.records[ANSWERS].values()
        comparison = report.Comparison(
            servers=(a, b),
            pairs=pairs,
            measured=measure(pairs, (a, b), plan.options, plan.confidence),
            limits=judged,
            options=plan.options,
            confidence=plan.confidence,
            prompts=plan.prompts.name,
            late=sum(line["late"] for line in lines),
        )
        result = report.build(comparison)
        write_text(plan.out / REPORT_JSON, json.dumps(result, indent=2) + "\n")
    return result


def fingerprint(pair: tuple[Server, Server], prompts: list[Prompt], options: Options) -> str:
    """Of all that decides what is measured."""
    dials = [options.rate, options.concurrency, options.logprobs, options.seed]
    every = [[server.identity() for server in pair], digest(prompts), dials]
    return hashlib.sha256(json.dumps(every).encode()).hexdigest()


def _replay(pair: Pair, prompts: list[Prompt], plan: Plan, journal: Journal) -> None:
    with Progress(len(prompts), "replaying", sys.stderr, quiet=plan.quiet) as progress:
        replay(pair, prompts, plan.options, journal, progress)
    if plan.options.logprobs:
        with Progress(len(prompts), "scoring", sys.stderr, quiet=plan.quiet) as progress:
            score(pair, prompts, plan.options, journal, progress)
