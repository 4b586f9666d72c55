"""How far a student's predictions are from its teacher's, as something to train by.

The generalised Jensen-Shannon divergence of GKD (Agarwal et al., 2023, arXiv:2306.13649, eq. 1). At
one position, p being the teacher's probabilities, q the student's, m = beta p + (1 - beta) q:

    JSD(beta) = beta KL(p || m) + (1 - beta) KL(q || m)

Its ends are, divided by their size, beta 0: KL(p || q), of knowledge distillation, where the
student has to cover all that the teacher says; and beta 1: KL(q || p), of MiniLLM (Gu et al., 2023,
arXiv:2306.08543), where it has to say nothing that the teacher would not.

Without the teacher's predictions the loss is that of single tokens, -log q of what follows (`ce`);
with its k likeliest tokens at a position, the KL of those and of all others taken as one:

    sum over k of p (log p - log q) + p' (log p' - log q'),   p' = 1 - sum of p, q' = 1 - sum of q

Fails where: the vocabularies differ.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LEAST = 1e-6
"""What the tokens that were not named have together at least."""


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


def of_token(student: Tensor, tokens: Tensor) -> Tensor:
    """-log q of `tokens` [n], at each place of logits [n, vocab]."""
    return torch.nn.functional.cross_entropy(student.float(), tokens, reduction="none")


def token_loss(tokens: Tensor, student: Tensor, counted: Tensor | None) -> Tensor:
    """Mean of -log q over the tokens [batch, n] that are `counted`, all unless given, but the
    first of each row; logits are [batch, n, vocab]."""
    found = of_token(student[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    return averaged(found, weights_of(tokens, counted).flatten())


def weights_of(tokens: Tensor, counted: Tensor | None) -> Tensor:
    """What the prediction at each place but the last counts, [batch, n - 1]."""
    return torch.ones_like(tokens[:, 1:]).float() if counted is None else counted[:, 1:].float()


def top_divergence(names: Tensor, log_p: Tensor, student: Tensor) -> Tensor:
    """Mean of the KL of the teacher's likeliest tokens `names` [batch, n, k], over the positions
    that have some; others, and tokens that are none, have -inf in `log_p` [batch, n, k]."""
    return averaged(top_by_position(student, names, log_p), named(log_p))


def named(log_p: Tensor) -> Tensor:
    """1 where a teacher has named tokens, else 0."""
    return (log_p != -math.inf).any(-1).float()


def top_by_position(student: Tensor, names: Tensor, log_p: Tensor) -> Tensor:
    """That KL at each position, [...]."""
    log_q = student.float().log_softmax(-1).gather(-1, names)
    none = log_p == -math.inf
    p, q = log_p.exp(), log_q.masked_fill(none, -math.inf).exp()
    known = (p * (log_p.masked_fill(none, 0) - log_q)).sum(-1)
    rest, left = ((1 - x.sum(-1)).clamp(min=LEAST) for x in (p, q))
    return known + rest * (rest.log() - left.log())


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    # What p rules out adds nothing; 0 * infinity would be NaN, and so would its gradient.
    difference = (log_p - log_q).masked_fill(log_p == -math.inf, 0)
    return (log_p.exp() * difference).sum(-1)
