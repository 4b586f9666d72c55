"""What a step of training lowers, and what the held-out text is judged by."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from compress_methods.recipe.training import TOPK_KL, Training
from compress_methods.training.lessons import COUNTED, TOKENS, TOP_LOGPROBS, TOP_TOKENS
from compress_methods.training.material import Batch
from compress_methods.training.objectives.chunks import in_chunks, is_large, predicted
from compress_methods.training.objectives.losses import (
    averaged,
    by_position,
    divergence,
    named,
    of_token,
    token_loss,
    top_by_position,
    top_divergence,
    weights_of,
)
from compress_methods.training.objectives.matching import Matcher
from compress_methods.training.objectives.on_policy import is_turn, sequence_loss, write
from compress_methods.training.student import Student


class Objective:
    """Of one student and one teacher, who need not be there where the text has its predictions."""

    def __init__(self, settings: Training, teacher: Any, student: Student) -> None:
        self.settings, self.teacher = settings, teacher
        self.matcher: Matcher | None = None
        if settings.match:
            self.matcher = Matcher(settings.match, teacher, student.model)
            if self.matcher.map is not None:
                student.beside.append(self.matcher.map)

    def learned(self, student: Student, batch: Batch, step: int) -> Tensor:
        """The loss of step `step`, from 0."""
        settings, tokens = self.settings, batch[TOKENS]
        if settings.by_token or settings.top_k:
            return self._by_token(student, batch)
        if not is_turn(step, settings.on_policy):
            return self._divergence(student, tokens, settings.beta)
        written = write(student, self.teacher, tokens, settings, step)
        if settings.teacher_mix:
            wanted, found, apart = self._both(student, written.tokens)
            return sequence_loss(wanted, found, written) + apart
        return self._divergence(student, written.tokens, settings.beta, written.weights)

    def _divergence(
        self, student: Student, tokens: Tensor, beta: float, weights: Tensor | None = None
    ) -> Tensor:
        """From the teacher, and how far inner states are apart; where the vocabulary is large its
        logits are never all in memory, unless inner states are looked at."""
        vocabulary = self.teacher.config.get_text_config().vocab_size
        if self.matcher is not None or not is_large(tokens, vocabulary):
            wanted, found, apart = self._both(student, tokens)
            return divergence(wanted, found, beta, weights) + apart
        values = student.values()
        mine = predicted(student.model, partial(student.run, values), values, tokens)
        with torch.no_grad():
            theirs = predicted(self.teacher, self.teacher, {}, tokens)

        def divergences(logits: Tensor, states: Tensor) -> Tensor:
            return by_position(theirs.logits(states), logits, beta)

        each = in_chunks(divergences, mine, [theirs.states], vocabulary)
        return each.mean() if weights is None else averaged(each, weights)

    def _both(self, student: Student, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor | float]:
        """Logits of teacher and student, and how far their inner states are apart."""
        if self.matcher is None:
            return self.wanted(tokens), student(tokens), 0.0
        given = {"input_ids": tokens, "use_cache": False, **self.matcher.asked}
        with torch.no_grad():
            theirs = self.teacher(**given)
        mine = student.run(student.values(), **given)
        return theirs.logits, mine.logits, self.matcher.loss(theirs, mine)

    def judged(self, student: Student, batch: Batch) -> Tensor:
        """What decides which step is kept: KL to the teacher, or what is learned where that is
        nothing of the teacher's."""
        if self.settings.by_token or self.settings.top_k:
            return self._by_token(student, batch)
        tokens = batch[TOKENS]
        if self.matcher is not None:
            return divergence(self.wanted(tokens), student(tokens), 0.0)
        return self._divergence(student, tokens, 0.0)

    @torch.no_grad()
    def wanted(self, tokens: Tensor) -> Tensor:
        """The teacher's logits."""
        logits: Tensor = self.teacher(input_ids=tokens, use_cache=False).logits
        return logits

    def _by_token(self, student: Student, batch: Batch) -> Tensor:
        tokens, counted = batch[TOKENS], batch.get(COUNTED)
        by_top = self.settings.loss == TOPK_KL or self.settings.top_k
        vocabulary = student.model.config.get_text_config().vocab_size
        if not is_large(tokens, vocabulary):
            logits = student(tokens)
            if by_top:
                return top_divergence(batch[TOP_TOKENS], batch[TOP_LOGPROBS], logits)
            return token_loss(tokens, logits, counted)
        values = student.values()
        mine = predicted(student.model, partial(student.run, values), values, tokens)
        if by_top:
            tops = [batch[TOP_TOKENS], batch[TOP_LOGPROBS]]
            each = in_chunks(top_by_position, mine, tops, vocabulary)
            return averaged(each, named(batch[TOP_LOGPROBS]))
        each = in_chunks(of_token, mine, [tokens.roll(-1, 1)], vocabulary)
        return averaged(each[:, :-1], weights_of(tokens, counted))
