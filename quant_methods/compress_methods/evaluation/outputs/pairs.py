"""Whether two models put pairs of texts in the same order, which is what embeddings and rerankers
are used for.

    rank_correlation   Spearman's rho between the scores that both models give to the pairs
    base_spearman,     rho of each model's scores with people's, where the file has them
    spearman

A model scores a pair by the cosine of both embeddings, pooled as `pooling.py` says; a classifier of
one label by its logit for both texts together. Intervals are Bonett and Wright's (Psychometrika 65,
2000): Fisher's z with a variance of (1 + rho^2 / 2) / (n - 3).

The file is .jsonl, a pair a line: {"sentence1": "...", "sentence2": "...", "score": 0.8}, the score
in all lines or none, on any scale. Fails where a classifier has several labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import NormalDist
from typing import Any

import torch

from compress_methods.calibration.text import jsonl_rows
from compress_methods.calibration.tokenizer import context_length, load_tokenizer
from compress_methods.checkpoint.loading.model import load_model
from compress_methods.errors import CalibrationError, CheckpointError
from compress_methods.evaluation.fit import loading_dtype
from compress_methods.evaluation.outputs.embeddings import cosine
from compress_methods.evaluation.outputs.pooling import pooled, pooling_of
from compress_methods.model.architecture import architecture_of
from compress_methods.model.device import AUTO, resolve_device
from compress_methods.model.task import CLASSES
from compress_methods.system.progress import Progress

LEAST, LONGEST = 4, 8192
CONFIDENCE = 0.95
KEYS = ("sentence1", "sentence2")
Score = Callable[[str, str], float]


@dataclass(frozen=True)
class Pair:
    """Two texts, and how alike people find them, if they were asked."""

    first: str
    second: str
    score: float | None = None


@dataclass(frozen=True)
class PairEvaluation:
    """Spearman's rho over `pairs`, those with people's scores None where there are none."""

    rank_correlation: float
    pairs: int
    base_spearman: float | None = None
    spearman: float | None = None
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, its keys those of the fields."""
        return {**asdict(self), "intervals": {k: list(v) for k, v in self.intervals.items()}}


def read_pairs(path: Path) -> list[Pair]:
    """The pairs of a file; `CalibrationError` names the line."""
    if path.suffix != ".jsonl" or not path.is_file():
        raise CalibrationError(f"{path}: expected a .jsonl file with {' and '.join(KEYS)} a line")
    pairs: list[Pair] = []
    for where, row in jsonl_rows(path):
        texts = [row.get(key) for key in KEYS] if isinstance(row, dict) else [None]
        if not all(isinstance(text, str) and text.strip() for text in texts):
            raise CalibrationError(f"{where}: expected texts under {' and '.join(KEYS)}")
        score = row.get("score")
        number = isinstance(score, (int, float)) and not isinstance(score, bool)
        if score is not None and not (number and math.isfinite(score)):
            raise CalibrationError(f"{where}: score is {score!r}, expected a number")
        if pairs and (score is None) != (pairs[0].score is None):
            raise CalibrationError(f"{where}: expected a score in all lines or none")
        pairs.append(Pair(str(texts[0]), str(texts[1]), score))
    if len(pairs) < LEAST:
        raise CalibrationError(f"{path}: {len(pairs)} pairs, expected {LEAST} or more")
    return pairs


def evaluate_pairs(
    model_dir: str | Path,
    base_dir: str | Path,
    path: str | Path,
    *,
    device: str = AUTO,
    progress: Progress | None = None,
) -> PairEvaluation:
    """Compare how a model and its original order the pairs of a file; `CheckpointError` or
    `CalibrationError`. `progress` counts pairs of both models; its total is set here."""
    pairs = read_pairs(Path(path))
    directories = (Path(base_dir), Path(model_dir))
    dtype = loading_dtype(directories, "use a machine with more")
    found: list[list[float]] = []
    if progress is not None:
        progress.total = 2 * len(pairs)
    for directory in directories:
        score = scorer(directory, Path(base_dir), dtype, device)
        found.append([])
        for pair in pairs:
            found[-1].append(score(pair.first, pair.second))
            if progress is not None:
                progress.step(1, directory.name)
    values = {"rank_correlation": spearman(*found)}
    wanted = [pair.score for pair in pairs if pair.score is not None]
    if wanted:
        values |= {"base_spearman": spearman(found[0], wanted)}
        values |= {"spearman": spearman(found[1], wanted)}
    intervals = {name: interval(value, len(pairs)) for name, value in values.items()}
    return PairEvaluation(pairs=len(pairs), intervals=intervals, **values)


def scorer(directory: Path, base: Path, dtype: torch.dtype, device: str) -> Score:
    """How a checkpoint scores two texts, tokenized as in `base`; `CheckpointError`."""
    model = load_model(directory, dtype, resolve_device(device))
    tokenizer, architecture = load_tokenizer(base), architecture_of(model.config)
    length = min(context_length(base) or LONGEST, tokenizer.model_max_length, LONGEST)
    limit = {"truncation": True, "max_length": length}
    if architecture.loss == CLASSES:
        if model.config.num_labels != 1:
            raise CheckpointError(
                f"{directory}: {model.config.num_labels} labels; pairs need one score or embeddings"
            )
        return lambda a, b: float(_run(model, tokenizer(a, b, **limit)).logits.flatten()[0])
    pooling = pooling_of(base, architecture)

    def embedded(text: str) -> torch.Tensor:
        return pooled(
            _run(model.base_model, tokenizer(text, **limit)).last_hidden_state[0], pooling
        )

    return lambda a, b: cosine(embedded(a), embedded(b))


@torch.inference_mode()
def _run(model: Any, tokens: Any) -> Any:
    asked = ("input_ids", "token_type_ids") if "token_type_ids" in tokens else ("input_ids",)
    return model(**{key: torch.tensor([tokens[key]], device=model.device) for key in asked})


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation of paired scores, ties sharing their mean rank; 0 where one is constant."""
    from scipy.stats import rankdata  # type: ignore[import-untyped]

    ranks = torch.tensor([rankdata(a).tolist(), rankdata(b).tolist()], dtype=torch.float64)
    ranks -= ranks.mean(1, keepdim=True)
    norms = ranks.norm(dim=1).prod()
    return float(ranks.prod(0).sum() / norms) if norms > 0 else 0.0


def interval(rho: float, n: int) -> tuple[float, float]:
    """95% interval of a rank correlation over n pairs."""
    if abs(rho) >= 1 or n <= LEAST - 1:
        return (rho, rho)
    half = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * math.sqrt((1 + rho**2 / 2) / (n - 3))
    return math.tanh(math.atanh(rho) - half), math.tanh(math.atanh(rho) + half)
