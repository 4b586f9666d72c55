"""Ask both servers the probes, and compare how many each gets right.

Answers are journaled by what was sent, so an edited probe is asked again and its check may change
freely. A probe that both servers refuse, for want of a chat template, of tools or of context, is
left out, and the report says how many; one that a single server refuses is wrong there.

    probes             all kinds together, judged by default: each kind alone is too few for that
    probes/KIND        share right, B - A
    probes/decisions   how much surer of the right choice, in nats, B - A: log P(right) less
                       log P(wrong), each of the whole text, from the servers' log-probabilities
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import repeat
from typing import Any

from compress_methods.evaluation.served import ServerError, text_log_likelihood
from compress_methods.evaluation.statistics import bounded_difference, mean_of
from compress_methods.system.http import HttpError
from compress_methods.system.progress import Progress
from vllm_compress.operations.abtest.probes.checks import CHECKS
from vllm_compress.operations.abtest.probes.files import CHOICES, Choice, Probe, Probes
from vllm_compress.operations.abtest.replay.client import Answer, Server
from vllm_compress.operations.abtest.replay.measure import Measurement
from vllm_compress.operations.abtest.replay.replay import (
    Batch,
    Options,
    Pair,
    ask_patiently,
    replay,
)
from vllm_compress.operations.journal import Journal

PROBES, DECISIONS = "probes", "decisions"
Records = Mapping[str, Mapping[str, Any]]


def batch_of(probes: Probes) -> Batch:
    """The probes as the client sends them; their times do not count."""
    prompts = [probe.prompt for probe in probes.asked]
    return Batch(prompts, PROBES, tuple(probe.key for probe in probes.asked), warm_up=False)


def missing_probes(probes: Probes, journal: Journal) -> int:
    """Count what is not in the journal."""
    asked = sum(not journal.done(PROBES, probe.key) for probe in probes.asked)
    return asked + sum(not journal.done(CHOICES, choice.key) for choice in probes.choices)


def run_probes(
    pair: Pair, probes: Probes, options: Options, journal: Journal, progress: Progress
) -> None:
    """Ask what is not in the journal, one at a time; raises `ServerError`."""
    replay(pair, batch_of(probes), replace(options, rate=None), journal, progress)
    with ThreadPoolExecutor(2) as pool:
        for choice in probes.choices:
            if journal.done(CHOICES, choice.key):
                progress.skip(1)
                continue
            a, b = pool.map(_decision, pair, repeat(choice))
            journal.record(CHOICES, choice.key, a=a, b=b)
            progress.step()


def _decision(server: Server, choice: Choice) -> float | None:
    """Nats by which the right choice is likelier; None where the server refuses to say."""
    try:
        good, bad = (
            ask_patiently(
                partial(text_log_likelihood, server.url, server.model, choice.prompt + end)
            )
            for end in (choice.right, choice.wrong)
        )
    except ServerError as problem:
        cause = problem.__cause__
        if isinstance(cause, HttpError) and cause.status in (400, 404, 501):
            return None
        raise
    return good - bad


def measure_probes(probes: Probes, records: Records, confidence: float) -> list[Measurement]:
    """One row for each kind, and one for all."""
    scores = {kind: list(_scores(kind, probes, records)) for kind in probes.kinds}
    every = [score for kind in probes.kinds for score in scores[kind]]
    counts = {kind: sum(probe.kind == kind for probe in probes.asked) for kind in probes.kinds}
    counts |= {CHOICES: len(probes.choices)} if CHOICES in counts else {}
    rows = [_row(PROBES, every, sum(counts.values()), confidence)] if probes.kinds else []
    for kind in probes.kinds:
        rows.append(_row(f"{PROBES}/{kind}", scores[kind], counts[kind], confidence))
    decided = list(_decisions(probes, records))
    if decided:
        a, b = zip(*decided, strict=True)
        change = mean_of([y - x for x, y in decided], confidence)
        means = sum(a) / len(a), sum(b) / len(b)
        rows.append(Measurement(f"{PROBES}/{DECISIONS}", means, change))
    return rows


def _row(
    name: str, scores: list[tuple[float, float]], asked: int, confidence: float
) -> Measurement:
    left_out = asked - len(scores)
    note = f"{left_out} of {asked} were answered by neither" if left_out else ""
    if not scores:
        return Measurement(name, None, None, note)
    a, b = zip(*scores, strict=True)
    change = bounded_difference(a, b, confidence)
    return Measurement(name, (sum(a) / len(a), sum(b) / len(b)), change, note)


def _scores(kind: str, probes: Probes, records: Records) -> Iterator[tuple[float, float]]:
    """Right or wrong, of A and B, for each probe of a kind that either answered."""
    if kind == CHOICES:
        yield from ((float(a > 0), float(b > 0)) for a, b in _decisions(probes, records))
        return
    for probe in probes.asked:
        if probe.kind == kind:
            line = records[PROBES][probe.key]
            a, b = (Answer.from_dict(line[side]) for side in "ab")
            if not (a.error and b.error):
                yield right(probe, a), right(probe, b)


def right(probe: Probe, answer: Answer) -> float:
    """1 where an answer has what is expected, else 0."""
    return float(not answer.error and CHECKS[probe.kind](probe.expect, answer))


def _decisions(probes: Probes, records: Records) -> Iterator[tuple[float, float]]:
    for choice in probes.choices:
        line = records[CHOICES][choice.key]
        if line["a"] is not None and line["b"] is not None:
            yield line["a"], line["b"]
