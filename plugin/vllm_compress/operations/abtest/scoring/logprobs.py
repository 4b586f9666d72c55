"""What two servers think of the same prompt: its likelihood, and how far their predictions differ.

vLLM returns, for every prompt token, its log-probability and those of the k likeliest tokens
(`prompt_logprobs`). From them, summed over the tokens of a prompt but the first:

    nll_a, nll_b   exact: minus the log-probability of the prompt's own tokens, in nats
    top1           exact: positions where the likeliest token is the same
    kl             KL(A || B) over the tokens that both returned and one bucket for all others. It
                   is exact with k = -1 and a lower bound otherwise: merging outcomes never raises
                   KL. How close depends on k and on how sure the model is.
    kl_most        an upper bound of it, if the tokens that not both returned lost on average no
                   more of their log-probability than the one that lost most at their position
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from compress_methods.evaluation.served import PartialKl, lowest, partial_kl


@dataclass(frozen=True)
class Score:
    """Sums over one prompt. A journal without `kl_most` knows no upper bound."""

    tokens: int
    nll_a: float
    nll_b: float
    kl: float
    top1: int
    kl_most: float = math.inf


def compare_logprobs(
    a: list[dict[int, float]], b: list[dict[int, float]], targets: list[int], whole: bool
) -> Score:
    """Sums for the log-probabilities of A and B by token id at every position, [n] each, and the
    tokens that followed; `whole` where they are those of the whole vocabulary."""
    nll_a = nll_b = 0.0
    top1, kl = 0, PartialKl()
    for one, other, target in zip(a, b, targets, strict=True):
        nll_a, nll_b = nll_a - one[target], nll_b - other[target]
        top1 += _likeliest(one) == _likeliest(other)
        common = [token for token in one if token in other]
        log_p, log_q = (
            torch.tensor([position[token] for token in common], dtype=torch.float64)
            for position in (one, other)
        )
        # What B did not return is no likelier there than the last token it did.
        lost = max((one[token] for token in one if token not in other), default=-math.inf)
        kl += partial_kl(log_p, log_q, whole, lost - lowest(other, target))
    return Score(len(targets), nll_a, nll_b, kl.least, top1, kl.most)


def _likeliest(position: dict[int, float]) -> int:
    return max(position, key=lambda token: (position[token], -token))
