"""The log-probabilities of an answer, as lines of the data keep them.

    ids            true where tokens are ids of the teacher's vocabulary, false where they are text
    tokens         those of the answer in order; a server may add those that end it
    logprobs       of each
    top_tokens     for each position the likeliest tokens, likeliest first
    top_logprobs   of each of them

Top-k KL of a student q to the teacher p at a position is the sum over its k tokens of
p (log p - log q), with one more term for all others, whose p is what the k leave of 1. It needs
ids, or texts that the student's tokenizer turns into one token each.

vLLM returns ids, other services texts. Values are those of the model before sampling (vLLM's
default) and rounded to five decimals; one below -9999, such as of a token that is ruled out, is
-9999.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

ID = "token_id:"
"""What vLLM puts before an id that it returns instead of a text."""
DECIMALS, LEAST = 5, -9999.0


def read_logprobs(choice: Mapping[str, Any]) -> dict[str, Any] | None:
    """Those of a choice of /v1/chat/completions or /v1/completions; None where it has none."""
    block = choice.get("logprobs") or {}
    if block.get("content"):
        positions = [
            (p["token"], p["logprob"], [(t["token"], t["logprob"]) for t in p["top_logprobs"]])
            for p in block["content"]
        ]
    elif block.get("tokens"):
        tops = block.get("top_logprobs") or [None] * len(block["tokens"])
        values = zip(block["tokens"], block["token_logprobs"], tops, strict=True)
        positions = [(token, value, list((top or {}).items())) for token, value, top in values]
    else:
        return None
    return _columns(positions)


def _columns(positions: Sequence[tuple[str, float, list[tuple[str, float]]]]) -> dict[str, Any]:
    sorted_tops = [sorted(top, key=lambda pair: -pair[1]) for _, _, top in positions]
    every = [token for token, _, _ in positions]
    every += [token for top in sorted_tops for token, _ in top]
    ids = all(token.startswith(ID) and token[len(ID) :].isdecimal() for token in every)

    def name(token: str) -> int | str:
        return int(token[len(ID) :]) if ids else token

    return {
        "ids": ids,
        "tokens": [name(token) for token, _, _ in positions],
        "logprobs": [_rounded(value) for _, value, _ in positions],
        "top_tokens": [[name(token) for token, _ in top] for top in sorted_tops],
        "top_logprobs": [[_rounded(value) for _, value in top] for top in sorted_tops],
    }


def _rounded(value: float) -> float:
    return round(max(value, LEAST), DECIMALS)
