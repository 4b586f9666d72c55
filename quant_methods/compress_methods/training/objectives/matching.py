"""Inner states of the teacher as something to train by, beside its predictions.

    hidden     mean over tokens and layers of ||h M - t||^2 / ||t||^2, h and t being the states that
               leave a layer of the student and the teacher (TinyBERT: Jiao et al., 2019,
               arXiv:1909.10351; DistilBERT: Sanh et al., 2019, arXiv:1910.01108, by the cosine).
               M is the identity, or where the widths differ a matrix that is learnt, the same for
               all layers, and forgotten afterwards. It starts at zero: so it learns before it
               teaches
    attention  mean over layers, heads and tokens of KL(teacher || student) of what a token attends
               to (MiniLM: Wang et al., 2020, arXiv:2002.10957); where the numbers of heads differ,
               of its mean over heads

Layer i of S is matched with layer round(i T / S) of T, the embeddings with the embeddings. Errors
are relative to a token's own state, so that the few massive ones do not count for all others.

Fails where: the layers that a student has lost are not evenly spread, so that it is to be after
each what it cannot be before the next; a model that tells nothing of its attention is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compress_methods.errors import RecipeError
from compress_methods.recipe.training import ATTENTION, HIDDEN

TINY = 1e-30
EAGER = "eager"


class Matcher:
    """Of one teacher and one student model, with the weight of each kind of states."""

    def __init__(self, weights: Mapping[str, float], teacher: Any, student: Any) -> None:
        self.weights = weights
        both = [model.config.get_text_config() for model in (teacher, student)]
        theirs, mine = (config.hidden_size for config in both)
        self.map: nn.Parameter | None = None
        if HIDDEN in weights and theirs != mine:
            self.map = nn.Parameter(torch.zeros(mine, theirs, device=student.device))
        self.asked = {"output_hidden_states": HIDDEN in weights}
        if ATTENTION in weights:
            self.asked["output_attentions"] = True
            for model in (teacher, student):
                model.set_attn_implementation(EAGER)

    def loss(self, teacher: Any, student: Any) -> Tensor:
        """Of what the models returned for the same tokens; differentiable in the student's."""
        found = student.logits.new_zeros(())
        if HIDDEN in self.weights:
            pairs = even_pairs(teacher.hidden_states, student.hidden_states, first=0)
            errors = [self._error(*pair) for pair in pairs]
            found = found + self.weights[HIDDEN] * torch.stack(errors).mean()
        if ATTENTION in self.weights:
            pairs = even_pairs(_attentions(teacher), _attentions(student), first=1)
            apart = [attention_divergence(*pair) for pair in pairs]
            found = found + self.weights[ATTENTION] * torch.stack(apart).mean()
        return found

    def _error(self, theirs: Tensor, mine: Tensor) -> Tensor:
        wanted = theirs.float()
        reached = mine.float() if self.map is None else mine.float() @ self.map
        sizes = wanted.square().sum(-1).clamp(min=TINY)
        return ((reached - wanted).square().sum(-1) / sizes).mean()


def even_pairs(
    teacher: Sequence[Tensor], student: Sequence[Tensor], first: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """States of the teacher with those of the student. `first`: the number of the first state, 0
    where what enters the first layer is one."""
    deep, layers = (len(states) - 1 + first for states in (teacher, student))
    for number, mine in enumerate(student, first):
        yield teacher[round(number * deep / layers) - first], mine


def attention_divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """Mean KL of two attentions [batch, heads, queries, keys]."""
    p, q = teacher.float(), student.float()
    if p.shape[1] != q.shape[1]:
        p, q = p.mean(1), q.mean(1)
    terms = p * (p.clamp(min=TINY).log() - q.clamp(min=TINY).log())
    return terms.sum(-1).mean()


def _attentions(out: Any) -> Sequence[Tensor]:
    """Those of the layers that have some."""
    found = [one for one in getattr(out, "attentions", None) or () if one is not None]
    if not found:
        raise RecipeError("match.attention: a model tells nothing of its attention; match hidden")
    return found
