"""Tasks of lm-evaluation-harness on both servers, question by question.

The harness asks through its OpenAI-compatible backend; `compress_methods.evaluation.harness` has
what it says of every question. A and B are compared on the same ones: pairs make the difference
several times more certain.

Fails where: a task's data cannot be had without network, or needs the model's tokenizer (for
log-likelihoods) and the served name or directory leads to none on this machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from compress_methods.evaluation.harness import (
    HARNESS,
    HarnessError,
    Scores,
    ask,
    require_harness,
)
from compress_methods.evaluation.statistics import bounded_difference
from compress_methods.system.http import headers
from compress_methods.system.progress import Progress
from vllm_compress.operations.abtest.replay.client import Server
from vllm_compress.operations.abtest.replay.measure import Measurement
from vllm_compress.operations.journal import Journal

CONCURRENT = 8


@dataclass(frozen=True)
class Task:
    """A task or group of tasks, or the file `NAME.yaml` that defines the task NAME, and how many
    questions of each to ask at most."""

    name: str
    limit: int | None = None

    @property
    def text(self) -> str:
        return self.name if self.limit is None else f"{self.name}:{self.limit}"


def read_tasks(text: str | None) -> list[Task]:
    """`gsm8k,hellaswag:200,mine.yaml`; raises `HarnessError`, also where there is no harness."""
    tasks = []
    for part in (text or "").split(",") if text else []:
        name, colon, number = part.strip().partition(":")
        if not name or (colon and not (number.isdecimal() and int(number) > 0)):
            raise HarnessError(f"--lm-eval: {part!r}, expected TASK or TASK:QUESTIONS")
        tasks.append(Task(name, int(number) if colon else None))
    if tasks:
        require_harness("--lm-eval")
    return tasks


def missing(tasks: list[Task], journal: Journal) -> list[tuple[Task, str]]:
    """List what is left to run: tasks, and the side to run them on."""
    every = [(task, side) for task in tasks for side in "ab"]
    return [(task, side) for task, side in every if not journal.done(HARNESS, _key(task, side))]


def run_tasks(
    servers: tuple[Server, Server], tasks: list[Task], journal: Journal, progress: Progress
) -> None:
    """Ask both servers the questions of every task that is not in the journal."""
    left = missing(tasks, journal)
    progress.skip(2 * len(tasks) - len(left))
    by_side = {server.side: server for server in servers}
    for task, side in left:
        journal.record(HARNESS, _key(task, side), scores=_evaluate(by_side[side], task))
        progress.step(1, task.name)


def measure_tasks(
    tasks: list[Task], records: Mapping[str, Mapping[str, Any]], confidence: float
) -> list[Measurement]:
    """One row per task and score, of the questions that both servers got."""
    rows = []
    for task in tasks:
        a, b = (records[HARNESS][_key(task, side)]["scores"] for side in "ab")
        for name in sorted(a.keys() & b.keys()):
            questions = sorted(a[name].keys() & b[name].keys())
            one, other = ([side[name][q] for q in questions] for side in (a, b))
            means = sum(one) / len(one), sum(other) / len(other)
            rows.append(Measurement(name, means, bounded_difference(one, other, confidence)))
    return rows


def _key(task: Task, side: str) -> str:
    return f"{task.text}/{side}"


def _evaluate(server: Server, task: Task) -> Scores:
    """Return scores by `task/score` and question."""
    arguments = {
        "base_url": f"{server.url}/v1/completions",
        "model": server.model,
        "tokenizer": server.root,
        "num_concurrent": CONCURRENT,
        "header": headers(),
    }
    return ask(task.name, server.url, task.limit, model="local-completions", model_args=arguments)
