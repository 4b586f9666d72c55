"""Questions with a right answer, asked of an original and its compressed form.

A `.jsonl` file has one multiple-choice question a line:

    {"prompt": "Q: The capital of France is\nA:", "choices": ["Paris", "Rome"], "answer": 0}

`answer` is the index of the right choice, or its text. A model answers with the choice whose tokens
have the highest log-likelihood after the prompt (`likelihood.py`), as `acc` of
lm-evaluation-harness has it. Choices follow the prompt after one space, unless either has white
space there.

A `.yaml` file is a task of lm-evaluation-harness with local data (`dataset_path: json`), answered
by the same log-likelihoods; it needs `pip install 'vllm-compress[lm-eval]'`; see `harness.py`.

Both models get the same questions, so what counts is the difference by question: its interval
(Bonett and Price, see `statistics.py`) is much narrower than that of either accuracy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compress_methods.calibration.text import jsonl_rows
from compress_methods.errors import CalibrationError
from compress_methods.evaluation.harness import run_task
from compress_methods.evaluation.likelihood import log_likelihoods
from compress_methods.evaluation.metrics import CONFIDENCE
from compress_methods.evaluation.statistics import Estimate, bounded_difference
from compress_methods.evaluation.streamed import StreamedModel
from compress_methods.system.progress import Progress
from compress_methods.system.user_file import require_path

KEYS = ("prompt", "choices", "answer")
QUESTIONS, HARNESS = (".jsonl",), (".yaml", ".yml")
ACCURACY = "acc"
Scores = Mapping[str, Mapping[str, float]]
"""By metric, the score from 0 to 1 of every question by its name."""


@dataclass(frozen=True)
class Question:
    """A prompt, what may follow it, and the index of what should."""

    prompt: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class TaskResult:
    """One metric of one task: both means, the change by question and its interval."""

    task: str
    metric: str
    base: float
    score: float
    change: Estimate

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "task": self.task,
            "metric": self.metric,
            "base_score": self.base,
            "score": self.score,
            "change": self.change.value,
            "interval": [self.change.low, self.change.high],
            "questions": self.change.n,
        }


def require_task(path: Path) -> None:
    """Refuse a file that cannot be a task, before models are loaded; `CalibrationError`."""
    require_path(path, CalibrationError)
    if path.suffix not in (*QUESTIONS, *HARNESS):
        expected = ", ".join((*QUESTIONS, *HARNESS))
        raise CalibrationError(f"{path}: ends in {path.suffix or 'nothing'!r}, expected {expected}")
    if not path.is_file():
        raise CalibrationError(f"{path}: no such file")
    if path.suffix in QUESTIONS:
        read_questions(path)


def score(
    path: Path,
    model: Path,
    base: Path,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
    allow_pickle: bool = False,
) -> Scores:
    """What a model directory scores in a task file, by metric and question.

    Tokens are those of the original's tokenizer, in `base`; one block of weights is in memory.
    Raises `CalibrationError`, `CheckpointError` or `HarnessError`.
    """
    require_task(path)
    streamed = StreamedModel(model, device, dtype, allow_pickle)
    if path.suffix in HARNESS:
        return run_task(path, streamed, base, progress)
    questions = read_questions(path)
    pairs = [pair for question in questions.values() for pair in _pairs(question)]
    likely = iter(log_likelihoods(streamed, base, pairs, progress))
    right = {}
    for name, question in questions.items():
        found = [next(likely)[0] for _ in question.choices]
        best = max(range(len(found)), key=found.__getitem__)
        right[name] = float(best == question.answer)
    return {ACCURACY: right}


def _pairs(question: Question) -> Iterator[tuple[str, str]]:
    """Prompt and continuation, for every choice."""
    for choice in question.choices:
        spaced = question.prompt[-1:].isspace() or choice[:1].isspace()
        yield question.prompt, choice if spaced else f" {choice}"


def compare(path: Path, base: Scores, other: Scores) -> list[TaskResult]:
    """Every metric that both were scored in, the accuracy first."""
    results = []
    for metric in sorted(base.keys() & other.keys(), key=lambda name: (name != ACCURACY, name)):
        questions = sorted(base[metric].keys() & other[metric].keys())
        one, two = ([scores[metric][q] for q in questions] for scores in (base, other))
        change = bounded_difference(one, two, CONFIDENCE)
        means = sum(one) / len(one), sum(two) / len(two)
        results.append(TaskResult(path.name, metric, *means, change))
    return results


def read_questions(path: Path) -> dict[str, Question]:
    """The questions of a .jsonl file by their place in it; raises `CalibrationError`."""
    questions = {where.rpartition(":")[2]: _question(row, where) for where, row in jsonl_rows(path)}
    if not questions:
        raise CalibrationError(f"{path}: holds no questions")
    return questions


def _question(row: Any, where: str) -> Question:
    if not isinstance(row, Mapping) or any(key not in row for key in KEYS):
        raise CalibrationError(f"{where}: expected an object with {', '.join(KEYS)}")
    prompt, choices, answer = (row[key] for key in KEYS)
    if not isinstance(prompt, str) or not prompt.strip():
        raise CalibrationError(f"{where}: prompt is {prompt!r:.80}, expected a text")
    if (
        not isinstance(choices, list)
        or len(choices) < 2
        or not all(isinstance(choice, str) and choice.strip() for choice in choices)
    ):
        raise CalibrationError(f"{where}: choices is {choices!r:.80}, expected two texts or more")
    if isinstance(answer, str) and choices.count(answer) == 1:
        answer = choices.index(answer)
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise CalibrationError(
            f"{where}: answer is {answer!r:.80}, expected an index from 0 to {len(choices) - 1} "
            "or the text of one choice"
        )
    return Question(prompt, tuple(choices), answer)
