"""Losses over large vocabularies, whose logits are never all in memory.

Two logits [positions, vocab] in float32, their log-probabilities and the gradients are nine times
as much as one of them: 128,000 tokens at 2,048 positions take 9 GB. Here the models give the states
that go into their heads, and heads and loss are computed for so many positions at a time as `LIMIT`
allows, and once more on the way back. The loss is the same.

Fails where: a model does more to its logits than its head says (caps, scales). That is found by
comparing one position, and the logits are then computed whole and only the loss in chunks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

LIMIT = 2**24
"""Values of a piece of logits."""
CLOSE = 1e-3


@dataclass(frozen=True)
class Predicted:
    """Logits [batch, length, vocab] as the states [batch, length, width] that a head makes them of;
    without one they are the logits."""

    states: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None

    def logits(self, states: Tensor) -> Tensor:
        """Of some of the states."""
        return states if self.weight is None else linear(states, self.weight, self.bias)


def is_large(tokens: Tensor, vocabulary: int) -> bool:
    """Whether the logits at all these places are better not computed at once."""
    return tokens.numel() * vocabulary > LIMIT


def predicted(
    model: Any, run: Callable[..., Any], values: Mapping[str, Tensor], tokens: Tensor
) -> Predicted:
    """What `run`, which calls `model` with such parameters, predicts after each of `tokens`."""
    body, given = model.base_model, {"input_ids": tokens, "use_cache": False}
    if body is not model and "logits_to_keep" in inspect.signature(model.forward).parameters:
        found: list[Tensor] = []
        hook = body.register_forward_hook(lambda _, __, out: found.append(out[0]))
        try:
            last = run(**given, logits_to_keep=1).logits[:, -1]
        finally:
            hook.remove()
        weight, bias = _head(model, values)
        whole = Predicted(found[-1], weight, bias)
        if torch.allclose(whole.logits(found[-1][:, -1]), last, rtol=CLOSE, atol=CLOSE):
            return whole
    return Predicted(run(**given).logits)


def _head(model: Any, values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    weight = values.get(f"{names[id(head)]}.weight")
    if weight is None and head.weight is table.weight:
        weight = values.get(f"{names[id(table)]}.weight")
    bias = values.get(f"{names[id(head)]}.bias", getattr(head, "bias", None))
    return head.weight if weight is None else weight, bias


def in_chunks(
    loss: Callable[..., Tensor], student: Predicted, others: Sequence[Tensor], vocabulary: int
) -> Tensor:
    """`loss` [n] of the student's logits [n, vocab] and of parts of `others` [batch, length, ...]
    at the same places, at all of them [batch, length]; differentiable in the student's states."""

    def piece(states: Tensor, *rest: Tensor) -> Tensor:
        return loss(student.logits(states), *rest)

    count = max(1, LIMIT // vocabulary)
    parts = [one.flatten(0, 1).split(count) for one in (student.states, *others)]
    found = [checkpoint(piece, *some, use_reentrant=False) for some in zip(*parts, strict=True)]
    return torch.cat(found).view(student.states.shape[:2])
