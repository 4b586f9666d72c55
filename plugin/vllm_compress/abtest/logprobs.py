"""What two servers think of the same prompt: its likelihood, and how far their predictions differ.

vLLM returns, for every prompt token, its log-probability and those of the k likeliest tokens
(`prompt_logprobs`). From them, summed over the tokens of a prompt but the first:

    nll_a, nll_b   exact: minus the log-probability of the prompt's own tokens, in nats
    top1           exact: positions where the likeliest token is the same
    kl             KL(A || B) over the tokens that both returned and one bucket for all others. It
                   is exact with k = -1 and a lower bound otherwise: merging outcomes never raises
                   KL. How close depends on k and on how sure the model is.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Score:
    """Sums over one prompt."""

    tokens: int
    nll_a: float
    nll_b: float
    kl: float
    top1: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(value: dict[str, Any]) -> Score:
        return Score(**value)


def compare_logprobs(
    a: list[dict[int, float]], b: list[dict[int, float]], targets: list[int], whole: bool
) -> Score:
    """Sums for the log-probabilities of A and B by token id at every position, [n] each, and the
    tokens that followed; `whole` where they are those of the whole vocabulary."""
    import torch

    from compress_methods.evaluate_served import partial_kl

    nll_a = nll_b = kl = 0.0
    top1 = 0
    for one, other, target in zip(a, b, targets, strict=True):
        nll_a, nll_b = nll_a - one[target], nll_b - other[target]
        top1 += _likeliest(one) == _likeliest(other)
        common = [token for token in one if token in other]
        log_p, log_q = (
            torch.tensor([position[token] for token in common], dtype=torch.float64)
            for position in (one, other)
        )
        kl += partial_kl(log_p, log_q, whole)
    return Score(len(targets), nll_a, nll_b, kl, top1)


def _likeliest(position: dict[int, float]) -> int:
    return max(position, key=lambda token: (position[token], -token))
