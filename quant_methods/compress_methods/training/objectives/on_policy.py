"""Text that the student itself writes while it learns.

Trained on text of others, a student never sees where its own mistakes lead. GKD (Agarwal et al.,
2023, arXiv:2306.13649) therefore has it continue beginnings of the text and learn from the
teacher's predictions of what it wrote; no gradient goes through the writing. The text is drawn at
temperature 1, a row's beginning being up to half of it.

With `teacher_mix` a it is MiniLLM (Gu et al., 2023, arXiv:2306.08543, eq. 3 to 7), which follows
the gradient of the whole text's KL(q || p). Each token y_t is drawn from a p + (1 - a) q, lest the
student finds texts that the teacher rates well and nobody writes, and weighted by
w_t = q(y_t) / (a p(y_t) + (1 - a) q(y_t)). The loss is, r_t = log p(y_t) - log q(y_t),

    mean of w_t KL(q_t || p_t) - w_t R_t log q(y_t),   R_t = mean of r_s over s > t, held fixed

where R_t is a mean, not a sum, so that short texts are no better than long ones, and less the mean
of the other rows' at the same place, which changes no expectation and lowers the noise.

The same seed and step give the same text. Fails where: text is long, for it is written token by
token; tokens after one that ends a text teach nothing, so short answers leave most rows unused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress_methods.calibration.self_generated import drawn
from compress_methods.recipe.training import Training
from compress_methods.training.objectives.losses import averaged, by_position
from compress_methods.training.student import Student

SPREAD = 1_000_003
"""So far apart are the seeds of two trainings' steps."""
SEEDS = 2**32


@dataclass(frozen=True)
class Written:
    """Rows of tokens [batch, length]. `weights` [batch, length]: what the prediction at each place
    counts, 0 in the beginnings that were given and after a text's end. `chosen`: whether the token
    that follows a place was drawn from it."""

    tokens: Tensor
    weights: Tensor
    chosen: Tensor


def is_turn(step: int, share: float) -> bool:
    """Whether the student writes the text of a step, from 0; evenly spread."""
    return math.floor((step + 1) * share) > math.floor(step * share)


@torch.no_grad()
def write(student: Student, teacher: Any, given: Tensor, settings: Training, step: int) -> Written:
    """Beginnings of the rows `given` [batch, length], continued to their length."""
    rows, length = given.shape
    generator = torch.Generator().manual_seed((settings.seed * SPREAD + step) % SEEDS)
    draws = torch.rand(length, rows, generator=generator).to(given.device)
    begins = torch.randint(1, length // 2 + 1, (rows,), generator=generator).to(given.device)
    ends = torch.tensor(end_tokens(teacher), device=given.device)
    writer = _Writer(student, teacher, settings.teacher_mix)
    tokens = given.clone()
    weights = torch.zeros(rows, length, device=given.device)
    chosen = torch.zeros(rows, length, dtype=torch.bool, device=given.device)
    going = torch.ones(rows, dtype=torch.bool, device=given.device)
    first = int(begins.min())
    new = tokens[:, :first]
    for place in range(first, length):
        found, weight = writer.next(new, draws[place])
        free = begins <= place
        new = torch.where(free[:, None], found, tokens[:, place, None])
        tokens[:, place] = new[:, 0]
        chosen[:, place - 1] = free & going
        weights[:, place - 1] = torch.where(free & going, weight, 0)
        going &= ~(free & torch.isin(new[:, 0], ends))
    weights[:, -1] = going
    return Written(tokens, weights, chosen)


class _Writer:
    """Draws from the student, mixed with the teacher, token by token."""

    def __init__(self, student: Student, teacher: Any, mix: float) -> None:
        self.student, self.teacher, self.mix = student, teacher, mix
        self.values = student.values()
        self.caches: list[Any] = [None, None]

    def next(self, new: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        """The token that follows `new` [batch, n], [batch, 1], and its weight [batch]."""
        own = {"input_ids": new, "past_key_values": self.caches[0], "use_cache": True}
        out = self.student.run(self.values, **own)
        self.caches[0] = out.past_key_values
        mine = out.logits[:, -1].float().softmax(-1)
        if not self.mix:
            return drawn(mine, draws), torch.ones_like(draws)
        out = self.teacher(input_ids=new, past_key_values=self.caches[1], use_cache=True)
        self.caches[1] = out.past_key_values
        theirs = out.logits[:, -1].float().softmax(-1)
        both = self.mix * theirs + (1 - self.mix) * mine
        found = drawn(both, draws)
        return found, (mine.gather(1, found) / both.gather(1, found))[:, 0]


def end_tokens(model: Any) -> list[int]:
    """Those that end a text, as the model's own files say."""
    for config in (getattr(model, "generation_config", None), model.config.get_text_config()):
        found = getattr(config, "eos_token_id", None)
        if found is not None:
            return [found] if isinstance(found, int) else list(found)
    return []


def sequence_loss(teacher: Tensor, student: Tensor, written: Written) -> Tensor:
    """MiniLLM's loss, of logits [batch, length, vocab] of what was written."""
    here = averaged(by_position(teacher, student, 1.0), written.weights)
    following = written.tokens.roll(-1, 1)[..., None]
    log_p, log_q = (
        logits.float().log_softmax(-1).gather(-1, following)[..., 0]
        for logits in (teacher, student)
    )
    chosen = written.chosen
    later = _later((log_p - log_q).detach(), chosen)
    ahead = averaged(later * log_q, written.weights * chosen)
    return here - ahead


def _later(rewards: Tensor, chosen: Tensor) -> Tensor:
    """Means of the rewards after each place, less those of the other rows there."""
    held = torch.where(chosen, rewards, 0)
    counts = chosen.flip(1).cumsum(1).flip(1) - chosen.long()
    sums = held.flip(1).cumsum(1).flip(1) - held
    means = sums / counts.clamp(min=1)
    used = (counts > 0) & chosen
    means = torch.where(used, means, 0)
    others = used.sum(0, keepdim=True) - used.long()
    base = (means.sum(0, keepdim=True) - means) / others.clamp(min=1)
    return torch.where(used & (others > 0), means - base, means)
