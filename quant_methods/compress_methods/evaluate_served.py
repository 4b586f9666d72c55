"""The measurements of `evaluate`, with the compressed model behind an OpenAI endpoint of vLLM.

vLLM's completions take a prompt of token ids and return, for every prompt token, its
log-probability and those of the `logprobs` likeliest tokens (`prompt_logprobs`, before any
sampling parameter). So, against the original computed here:

    perplexity, top1_agreement   exact: the prompt's own tokens, and those of rank 1
    kl, with logprobs = -1       exact, from a server started with --max-logprobs -1; slow: vLLM
                                 took 40 us per token and vocabulary entry on two busy cores, so
                                 a thousand tokens are 3 minutes at 4k entries, 1.5 hours at 128k
    kl, otherwise                a lower bound: KL over the returned tokens and one bucket for all
                                 others (merging outcomes never raises KL)

Fails where: the server's context is shorter than a window and one token more.
"""

from __future__ import annotations

import json
import math
import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress_methods.errors import CheckpointError, CompressError
from compress_methods.evaluate import (
    Evaluation,
    Sums,
    check_length,
    load_tokenizer,
    next_token_logits,
    token_nll,
)
from compress_methods.progress import Progress

TIMEOUT = 600.0
DEFAULT_LOGPROBS = 20
# Sums of 20 float32 probabilities are off by about this much. Raising the served model's remainder
# to it can only lower the bound.
LEAST_REMAINDER = 1e-6


class ServerError(CompressError):
    """A server that does not answer, or does not serve what was asked for."""


def evaluate_url(
    url: str,
    base_dir: str | Path,
    text_path: str | Path,
    *,
    model: str | None = None,
    length: int = 512,
    limit_tokens: int | None = None,
    logprobs: int = DEFAULT_LOGPROBS,
    progress: Progress | None = None,
) -> Evaluation:
    """Compare the model served at `url` with the original in `base_dir` on a text.

    `model` is its served name, or the directory it was started from; it may be left out where the
    server has one model only. `logprobs` -1 asks for the whole vocabulary. `progress` counts
    tokens; its total is set here. Raises `ServerError`, `CheckpointError` or `CalibrationError`.
    """
    from compress_methods.loading import load_model
    from compress_methods.memory import loading_dtype
    from compress_methods.text import windows

    base_path = Path(base_dir)
    server = url.rstrip("/").removesuffix("/v1")
    card = served_model(server, model)
    limit = card.get("max_model_len")
    if isinstance(limit, int) and length >= limit:
        raise ServerError(f"{server}: takes {limit} tokens; give a length of {limit - 1} at most")
    check_length(base_path, length)
    dtype = loading_dtype([base_path], "use a machine with more")
    texts = windows(Path(text_path), load_tokenizer(base_path), length, limit_tokens)
    base = load_model(base_path, dtype)
    sums, exact = Sums(), True
    if progress is not None:
        progress.total = sum(len(window) for window in texts)
    for window in texts:
        served = prompt_logprobs(server, card["id"], window.tolist(), logprobs)
        totals, whole = _compare(next_token_logits(base, window).float(), served, window[1:])
        sums, exact = sums + totals, exact and whole
        if progress is not None:
            progress.step(len(window))
    return sums.result("exact" if exact else "lower_bound")


def served_model(server: str, wanted: str | None, option: str = "--model") -> dict[str, Any]:
    """The /v1/models entry whose name or directory is `wanted`; `option` is what the user gives."""
    cards = request_json(f"{server}/v1/models").get("data") or []
    if wanted is None:
        matches = cards
    else:
        matches = [c for c in cards if c["id"] == wanted] or [c for c in cards if _is(c, wanted)]
    if len(matches) != 1:
        names = ", ".join(card["id"] for card in cards) or "no model"
        what = f"{wanted} is not" if wanted is not None else "more than one model, or none, is"
        raise ServerError(f"{server}: {what} served; it serves {names}; name one with {option}")
    return dict(matches[0])


def _is(card: Mapping[str, Any], wanted: str) -> bool:
    """Whether a server was started from the directory `wanted`."""
    roots = {card["id"], card.get("root") or card["id"]}
    return any(Path(root).resolve() == Path(wanted).resolve() for root in roots)


def prompt_logprobs(
    server: str, model: str, tokens: list[int], logprobs: int
) -> list[dict[int, float]]:
    """Log-probability by token id, for each position of `tokens` but the first: of the `logprobs`
    likeliest tokens and of the prompt's own."""
    body = {
        "model": model,
        "prompt": tokens,
        "max_tokens": 1,
        "temperature": 0,
        "prompt_logprobs": logprobs,
    }
    answer = request_json(f"{server}/v1/completions", body)
    positions = answer["choices"][0].get("prompt_logprobs")
    if positions is None or len(positions) != len(tokens):
        raise ServerError(f"{server}: answered without prompt_logprobs; expected a vLLM server")
    return [{int(i): e["logprob"] for i, e in position.items()} for position in positions[1:]]


def _compare(base: Tensor, served: list[dict[int, float]], targets: Tensor) -> tuple[Sums, bool]:
    """Totals for base logits [n, vocab] and served log-probabilities; whether KL is exact."""
    vocabulary = base.shape[-1]
    nll, kl, top1, exact = 0.0, 0.0, 0, True
    for logits, position, target in zip(base, served, targets.tolist(), strict=True):
        if max(position) >= vocabulary:
            raise CheckpointError(
                f"the server returned token {max(position)}, but the original has {vocabulary}"
            )
        nll -= position[target]
        likeliest = max(position, key=lambda token: (position[token], -token))
        top1 += int(logits.argmax()) == likeliest
        whole = len(position) == vocabulary
        log_q = torch.tensor(list(position.values()), dtype=torch.float64)
        kl += partial_kl(logits.log_softmax(-1)[list(position)], log_q, whole)
        exact = exact and whole
    base_nll = token_nll(base, targets).double().sum().item()
    return Sums(nll, base_nll, kl, top1, len(targets)), exact


def partial_kl(log_p: Tensor, log_q: Tensor, whole: bool) -> float:
    """KL over the tokens whose log-probabilities [n] are given, unless they are all with one more
    bucket for the others."""
    some_p, some_q = log_p.double(), log_q.double()
    terms = some_p.exp() * (some_p - some_q)
    kl = terms.masked_fill(some_p == -math.inf, 0).sum().item()
    rest_p = 1 - some_p.exp().sum().item()
    if not whole and rest_p > 0:
        rest_q = max(1 - some_q.exp().sum().item(), LEAST_REMAINDER)
        kl += rest_p * math.log(rest_p / rest_q)
    return kl


def headers() -> dict[str, str]:
    """Of every request; with the key in VLLM_API_KEY, where vLLM's server looks for it too."""
    key = os.environ.get("VLLM_API_KEY")
    return {
        "Content-Type": "application/json",
        **({"Authorization": f"Bearer {key}"} if key else {}),
    }


def request_json(url: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """GET, or POST of `body`, both JSON; raises `ServerError`."""
    data = None if body is None else json.dumps(body).encode()
    try:
        request = urllib.request.Request(url, data, headers())
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            value = json.load(answer)
    except urllib.error.HTTPError as problem:
        raise ServerError(f"{url}: {_refusal(problem)}") from problem
    except (OSError, ValueError) as problem:
        reason = getattr(problem, "reason", problem)
        raise ServerError(f"{url}: no answer from a vLLM server ({reason})") from problem
    if not isinstance(value, dict):
        raise ServerError(f"{url}: answered {type(value).__name__}, expected a JSON object")
    return value


def _refusal(problem: urllib.error.HTTPError) -> str:
    """What the server says it refuses, in one line."""
    try:
        message = " ".join(str(json.load(problem)["error"]["message"]).split())
    except (ValueError, KeyError, TypeError):
        message = problem.reason
    if "logprobs" in message:
        message += "; start the server with a larger --max-logprobs (-1: all) or ask for fewer"
    return f"HTTP {problem.code}: {message}"
