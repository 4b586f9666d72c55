"""How far a student's predictions are from its teacher's, as something to train by.

The generalised Jensen-Shannon divergence of GKD (Agarwal et al., 2023, arXiv:2306.13649, eq. 1). At
one position, p being the teacher's probabilities, q the student's, m = beta p + (1 - beta) q:

    JSD(beta) = beta KL(p || m) + (1 - beta) KL(q || m)

Its ends are, divided by their size, beta 0: KL(p || q), of knowledge distillation, where the
student has to cover all that the teacher says; and beta 1: KL(q || p), of MiniLLM (Gu et al., 2023,
arXiv:2306.08543), where it has to say nothing that the teacher would not.

Fails where: the vocabularies differ.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def divergence(
    teacher: Tensor, student: Tensor, beta: float, weights: Tensor | None = None
) -> Tensor:
    """Mean over positions, in nats, of two logits [..., vocab]; differentiable in `student`.
    `weights` [...]: what each position counts, 0 where it does not."""
    found = by_position(teacher, student, beta)
    return found.mean() if weights is None else averaged(found, weights)


def averaged(values: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum over the number of positions that count; 0 where none does."""
    return (values * weights).sum() / (weights > 0).sum().clamp(min=1)


def by_position(teacher: Tensor, student: Tensor, beta: float) -> Tensor:
    """The divergence at each position, [...]."""
    log_p, log_q = teacher.float().log_softmax(-1), student.float().log_softmax(-1)
    if beta == 0:
        return _kl(log_p, log_q)
    if beta == 1:
        return _kl(log_q, log_p)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    # What p rules out adds nothing; 0 * infinity would be NaN, and so would its gradient.
    difference = (log_p - log_q).masked_fill(log_p == -math.inf, 0)
    return (log_p.exp() * difference).sum(-1)
