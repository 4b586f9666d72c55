"""Tasks of lm-evaluation-harness, question by question.

The harness (`lm_eval`, an optional extra) may ask a server or a model that is loaded here. What
counts is not its averages but the score of every single question, so that two models are compared
on the same ones. Scores from 0 to 1 of which more is better are used (acc, exact_match, ...);
corpus measures such as perplexity or BLEU are not.

Fails where: the harness is not installed, or a task's data cannot be had without network.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from compress_methods.errors import CompressError
from compress_methods.evaluation.likelihood import log_likelihoods
from compress_methods.evaluation.streamed import StreamedModel
from compress_methods.system.progress import Progress

HARNESS = "lm_eval"
Scores = dict[str, dict[str, float]]


class HarnessError(CompressError):
    """A harness that is not installed, does not know a task or fails in one."""


def require_harness(wants: str) -> None:
    """`HarnessError` where it is not installed; `wants` is the option or file that needs it."""
    if find_spec(HARNESS) is None:
        raise HarnessError(
            f"{wants} needs lm-evaluation-harness; pip install 'vllm-compress[lm-eval]'"
        )


def ask(task: str, where: str, limit: int | None = None, **model: Any) -> Scores:
    """Scores by `task/metric` and question of a task's name, or of the file `NAME.yaml` that
    defines the task NAME; `model` is how the harness finds its model, `where` names it in errors.
    """
    try:
        # It prints; our own output may be JSON.
        with contextlib.redirect_stdout(sys.stderr):
            path = Path(task)
            own = path.parent if path.suffix in (".yaml", ".yml") else None
            manager = import_module(f"{HARNESS}.tasks").TaskManager(include_path=own)
            found = import_module(HARNESS).simple_evaluate(
                **model,
                tasks=[path.stem if own else task],
                task_manager=manager,
                limit=limit,
                bootstrap_iters=0,
            )
    except Exception as problem:  # whatever a task, its data or the harness raises
        reason = " ".join(str(problem).split())[:200] or type(problem).__name__
        raise HarnessError(f"lm-evaluation-harness, {task} on {where}: {reason}") from problem
    return dict(_scores(found or {}))


def run_task(path: Path, model: StreamedModel, base: Path, progress: Progress | None) -> Scores:
    """Scores by metric and question in the task that a .yaml file defines, with one block of
    weights in memory; the tokenizer is that of `base`. Log-likelihoods of continuations are all
    that is computed so (`output_type: multiple_choice` or `loglikelihood`); `HarnessError`."""
    require_harness(str(path))
    kind: Any = import_module(f"{HARNESS}.api.model").LM

    class Streamed(kind):
        def loglikelihood(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
            return log_likelihoods(model, base, [one.args for one in requests], progress)

        def loglikelihood_rolling(self, requests: list[Any], **_: Any) -> Any:
            raise HarnessError("output_type: expected multiple_choice or loglikelihood")

        generate_until = loglikelihood_rolling

    found = ask(str(path), model.source.name, model=Streamed())
    if not found:
        raise HarnessError(f"{path}: has no score from 0 to 1 of which more is better")
    return {name.partition("/")[2]: questions for name, questions in found.items()}


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
