"""Masked language models: what is predicted where a token was hidden (Devlin et al., 2018).

A share of 15% of a text's tokens is replaced by the mask, all at once; both models see the same
ones. KL, agreement and the perplexity of the hidden tokens are over those places alone: what a
model says of a token that it sees is nearly always that token, and tells little.

Fails where: the tokenizer has no mask.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compress_methods.errors import CalibrationError
from compress_methods.evaluation.metrics import Sums, compare_logits

SHARE = 0.15


class Mask:
    """Hides tokens, the same ones for the same `seed`; `CalibrationError`."""

    def __init__(self, tokenizer: Any, seed: int = 0) -> None:
        token = getattr(tokenizer, "mask_token_id", None)
        if token is None:
            raise CalibrationError(
                f"{tokenizer.name_or_path}: the tokenizer has no mask token, so nothing can be "
                "hidden from a masked language model"
            )
        self.token = int(token)
        self.special = torch.tensor(tokenizer.all_special_ids)
        self.generator = torch.Generator().manual_seed(seed)

    def hide(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens [n] with some replaced, and where [m]; one at the least, none special."""
        order = torch.rand(len(tokens), generator=self.generator).argsort()
        order = order[~torch.isin(tokens[order], self.special)]
        places = order[: max(1, round(SHARE * len(tokens)))].sort().values
        return tokens.index_fill(0, places, self.token), places


def compare_masked(base: Tensor, other: Tensor, tokens: Tensor, places: Tensor) -> Sums:
    """Totals of both models' logits [n, vocab] at the hidden places [m] of `tokens` [n]."""
    return compare_logits(base[places], other[places], tokens[places])
