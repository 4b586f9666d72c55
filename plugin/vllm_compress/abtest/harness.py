"""Tasks of lm-evaluation-harness on both servers, question by question.

The harness (`lm_eval`, an optional extra) asks through its OpenAI-compatible backend. What counts
here is not its averages but the score of every single question, so that A and B are compared on the
same ones: pairs make the difference several times more certain. Scores from 0 to 1 of which more is
better are used (acc, exact_match, ...); corpus measures such as perplexity or BLEU are not.

Fails where: a task's data cannot be had without network, or needs the model's tokenizer (for
log-likelihoods) and the served name or directory leads to none on this machine.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from compress_methods.errors import CompressError
from compress_methods.evaluate_served import headers
from compress_methods.progress import Progress
from vllm_compress.abtest import statistics as st
from vllm_compress.abtest.client import Server
from vllm_compress.abtest.journal import Journal
from vllm_compress.abtest.measure import Measured

HARNESS = "lm_eval"
CONCURRENT = 8
Scores = dict[str, dict[str, float]]


class HarnessError(CompressError):
    """A harness that is not installed, does not know a task or fails in one."""


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
    if tasks and find_spec(HARNESS) is None:
        raise HarnessError(
            "--lm-eval needs lm-evaluation-harness; pip install 'vllm-compress[lm-eval]'"
        )
    return tasks


def missing(tasks: list[Task], journal: Journal) -> list[tuple[Task, str]]:
    """What is left to run: tasks, and the side to run them on."""
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
) -> list[Measured]:
    """One row per task and score, of the questions that both servers got."""
    rows = []
    for task in tasks:
        a, b = (records[HARNESS][_key(task, side)]["scores"] for side in "ab")
        for name in sorted(a.keys() & b.keys()):
            questions = sorted(a[name].keys() & b[name].keys())
            one, other = ([side[name][q] for q in questions] for side in (a, b))
            means = sum(one) / len(one), sum(other) / len(other)
            rows.append(Measured(name, means, st.bounded_difference(one, other, confidence)))
    return rows


def _key(task: Task, side: str) -> str:
    return f"{task.text}/{side}"


def _evaluate(server: Server, task: Task) -> Scores:
    """Scores by `task/score` and question."""
    arguments = {
        "base_url": f"{server.url}/v1/completions",
        "model": server.model,
        "tokenizer": server.root,
        "num_concurrent": CONCURRENT,
        "header": headers(),
    }
    try:
        # It prints; our own output may be JSON.
        with contextlib.redirect_stdout(sys.stderr):
            path = Path(task.name)
            own = path.parent if path.suffix == ".yaml" else None
            manager = import_module(f"{HARNESS}.tasks").TaskManager(include_path=own)
            found = import_module(HARNESS).simple_evaluate(
                model="local-completions",
                model_args=arguments,
                tasks=[path.stem if own else task.name],
                task_manager=manager,
                limit=task.limit,
                bootstrap_iters=0,
            )
    except Exception as problem:  # whatever a task, its data or the harness raises
        reason = " ".join(str(problem).split())[:200] or type(problem).__name__
        raise HarnessError(f"lm-evaluation-harness, {task.name} on {server.url}: {reason}") from (
            problem
        )
    return dict(_scores(found or {}))


def _scores(found: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, float]]]:
    for task, samples in found.get("samples", {}).items():
        better = found.get("higher_is_better", {}).get(task, {})
        filters = {sample["filter"] for sample in samples}
        for name in sorted({metric for sample in samples for metric in sample["metrics"]}):
            for kind in sorted(filters):
                values = {
                    str(sample["doc_id"]): _number(sample.get(name))
                    for sample in samples
                    if sample["filter"] == kind
                }
                if better.get(name) is not False and all(0 <= v <= 1 for v in values.values()):
                    suffix = f"/{kind}" if len(filters) > 1 else ""
                    yield f"{task}/{name}{suffix}", values


def _number(value: Any) -> float:
    """NaN for what is no single number."""
    return float(value) if isinstance(value, (bool, int, float)) else math.nan
