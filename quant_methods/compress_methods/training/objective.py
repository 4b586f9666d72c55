"""What a step of training lowers, and what the held-out text is judged by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compress_methods.recipe.training import TOPK_KL, Training
from compress_methods.training.lessons import COUNTED, TOKENS, TOP_LOGPROBS, TOP_TOKENS
from compress_methods.training.losses import divergence, token_loss, top_divergence
from compress_methods.training.material import Batch
from compress_methods.training.on_policy import is_turn, sequence_loss, write
from compress_methods.training.student import Student


class Objective:
    """Of one student and one teacher."""

    def __init__(self, settings: Training, teacher: Any) -> None:
        self.settings, self.teacher = settings, teacher

    def learned(self, student: Student, batch: Batch, step: int) -> Tensor:
        """The loss of step `step`, from 0."""
        settings, tokens = self.settings, batch[TOKENS]
        if settings.by_token:
            return self._by_token(student, batch)
        if not is_turn(step, settings.on_policy):
            return divergence(self.wanted(tokens), student(tokens), settings.beta)
        written = write(student, self.teacher, tokens, settings, step)
        logits = self.wanted(written.tokens), student(written.tokens)
        if settings.teacher_mix:
            return sequence_loss(*logits, written)
        return divergence(*logits, settings.beta, written.weights)

    def judged(self, student: Student, batch: Batch) -> Tensor:
        """What decides which step is kept: KL to the teacher, or what is learned where that is
        nothing of the teacher's."""
        if self.settings.by_token:
            return self._by_token(student, batch)
        return divergence(self.wanted(batch[TOKENS]), student(batch[TOKENS]), 0.0)

    @torch.no_grad()
    def wanted(self, tokens: Tensor) -> Tensor:
        """The teacher's logits."""
        logits: Tensor = self.teacher(input_ids=tokens, use_cache=False).logits
        return logits

    def _by_token(self, student: Student, batch: Batch) -> Tensor:
        logits = student(batch[TOKENS])
        if self.settings.loss == TOPK_KL:
            return top_divergence(batch[TOP_TOKENS], batch[TOP_LOGPROBS], logits)
        return token_loss(batch[TOKENS], logits, batch.get(COUNTED))
