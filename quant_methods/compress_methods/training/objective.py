"""What a step of training lowers, and what the held-out text is judged by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from compress_methods.recipe.training import Training
from compress_methods.training.losses import divergence
from compress_methods.training.on_policy import is_turn, sequence_loss, write
from compress_methods.training.student import Student

TOKENS = "input_ids"
Batch = Mapping[str, Tensor]


class Objective:
    """Of one student and one teacher."""

    def __init__(self, settings: Training, teacher: Any) -> None:
        self.settings, self.teacher = settings, teacher

    def learned(self, student: Student, batch: Batch, step: int) -> Tensor:
        """The loss of step `step`, from 0."""
        settings, tokens = self.settings, batch[TOKENS]
        if not is_turn(step, settings.on_policy):
            return divergence(self.wanted(tokens), student(tokens), settings.beta)
        written = write(student, self.teacher, tokens, settings, step)
        logits = self.wanted(written.tokens), student(written.tokens)
        if settings.teacher_mix:
            return sequence_loss(*logits, written)
        return divergence(*logits, settings.beta, written.weights)

    def judged(self, student: Student, batch: Batch) -> Tensor:
        """What decides which step is kept."""
        return divergence(self.wanted(batch[TOKENS]), student(batch[TOKENS]), 0.0)

    @torch.no_grad()
    def wanted(self, tokens: Tensor) -> Tensor:
        """The teacher's logits."""
        logits: Tensor = self.teacher(input_ids=tokens, use_cache=False).logits
        return logits
