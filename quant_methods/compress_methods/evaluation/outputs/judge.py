"""What two models make of the same text, compared as the model's task asks (`model/task.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from compress_methods.errors import RecipeError
from compress_methods.evaluation.metrics import Evaluation, Sums, compare_predictions, summarize
from compress_methods.evaluation.outputs.classes import (
    ClassEvaluation,
    compare_classes,
    summarize_classes,
)
from compress_methods.evaluation.outputs.embeddings import (
    EmbeddingEvaluation,
    cosine,
    summarize_cosines,
)
from compress_methods.evaluation.outputs.pooling import pooled, pooling_of
from compress_methods.model.architecture import Architecture
from compress_methods.model.skeleton import Skeleton
from compress_methods.model.task import CLASSES, NEXT_TOKEN, STATES

TOKENS_WANTED = "judges by the probability of tokens, which {kind} does not give"

Outcome = Evaluation | ClassEvaluation | EmbeddingEvaluation


class Judge:
    """Compares a text's outputs; `pooling` of a model that gives states."""

    def __init__(self, loss: str, pooling: str) -> None:
        self.loss, self.pooling = loss, pooling

    @classmethod
    def of(cls, architecture: Architecture, directory: Path) -> Judge:
        """For a checkpoint directory of such a model; `CheckpointError`."""
        gives_states = architecture.loss == STATES
        return cls(architecture.loss, pooling_of(directory, architecture) if gives_states else "")

    def compare(self, base: Tensor, other: Tensor, tokens: Tensor) -> Sums | float:
        """One text's observation: outputs of both models for `tokens` [n], without a batch."""
        if self.loss == CLASSES:
            return compare_classes(base, other)
        if self.loss == STATES:
            return cosine(pooled(base, self.pooling), pooled(other, self.pooling))
        return compare_predictions(base, other, tokens, self.loss == NEXT_TOKEN)

    def result(self, texts: Sequence[Any]) -> Outcome:
        """Means over all of them."""
        if self.loss == CLASSES:
            return summarize_classes(texts)
        return summarize_cosines(texts) if self.loss == STATES else summarize(texts)


def gives_tokens(skeleton: Skeleton) -> bool:
    """Whether the model's outputs are probabilities of tokens."""
    return skeleton.architecture.loss not in (CLASSES, STATES)


def require_tokens(skeleton: Skeleton, what: str) -> None:
    """`RecipeError` where a recipe asks for a measure that the model's outputs do not allow."""
    if not gives_tokens(skeleton):
        kind = type(skeleton.model).__name__
        raise RecipeError(f"{what}: {TOKENS_WANTED.format(kind=kind)}")
