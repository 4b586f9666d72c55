"""The measurements of `evaluate`, with the compressed model behind an OpenAI endpoint of vLLM.

vLLM's completions take a prompt of token ids and return, for every prompt token, its
log-probability and those of the `logprobs` likeliest tokens (`prompt_logprobs`, before any
sampling parameter). So, against the original computed here:

    perplexity, top1_agreement   exact: the prompt's own tokens, and those of rank 1
    kl, with logprobs = -1       exact, from a server started with --max-logprobs -1; slow: vLLM
                                 took 40 us per token and vocabulary entry on two busy cores, so
                                 a thousand tokens are 3 minutes at 4k entries, 1.5 hours at 128k
    kl, otherwise                at least the KL over the returned tokens and one bucket for all
                                 others (merging outcomes never raises KL); at most (`kl_most`) that
                                 with the others losing, on average, as much log-probability as the
                                 returned token that lost most at the same position
    acceptance                   exact with all tokens, else the least it is, over those returned
    margin_ratio                 with all tokens only

The latter is no law: a model may spoil just those tokens that no server returns. Ask for all where
20 tokens at every position are not sample enough.

Fails where: the server's context is shorter than a window and one token more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress_methods.calibration.tokenizer import check_length, load_tokenizer
from compress_methods.checkpoint.compressed import read_json
from compress_methods.errors import CheckpointError, CompressError
from compress_methods.evaluation.metrics import (
    LOWER_BOUND,
    Evaluation,
    Sums,
    margin_ratios,
    summarize,
    token_nll,
)
from compress_methods.evaluation.offline import next_token_logits
from compress_methods.model.architecture import architecture_of
from compress_methods.model.device import AUTO
from compress_methods.model.task import NEXT_TOKEN
from compress_methods.system.http import request_json
from compress_methods.system.progress import Progress

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
    device: str = AUTO,
) -> Evaluation:
    """Compare the model served at `url` with the original in `base_dir` on a text.

    `model` is its served name, or the directory it was started from; it may be left out where the
    server has one model only. `logprobs` -1 asks for the whole vocabulary. `progress` counts
    tokens; its total is set here. Raises `ServerError`, `CheckpointError` or `CalibrationError`.
    """
    from compress_methods.calibration.text import require_text, windows
    from compress_methods.checkpoint.loading.model import load_model
    from compress_methods.evaluation.fit import loading_dtype
    from compress_methods.model.device import resolve_device

    base_path, place = Path(base_dir), resolve_device(device)
    require_text(Path(text_path))
    server = url.rstrip("/").removesuffix("/v1")
    card = served_model(server, model)
    limit = card.get("max_model_len")
    if isinstance(limit, int) and length >= limit:
        raise ServerError(f"{server}: takes {limit} tokens; give a length of {limit - 1} at most")
    check_length(base_path, length)
    dtype = loading_dtype([base_path], "use a machine with more")
    if architecture_of(read_json(base_path / "config.json")).loss != NEXT_TOKEN:
        raise CheckpointError(f"{base_path}: predicts no next token to ask for; leave out --url")
    texts = windows(Path(text_path), load_tokenizer(base_path), length, limit_tokens)
    base = load_model(base_path, dtype, place)
    sums: list[Sums] = []
    exact = True
    if progress is not None:
        progress.total = sum(len(window) for window in texts)
    for window in texts:
        served = prompt_logprobs(server, card["id"], window.tolist(), logprobs)
        totals, whole = _compare(next_token_logits(base, window).float(), served, window[1:])
        sums.append(totals)
        exact = exact and whole
        if progress is not None:
            progress.step(len(window))
    if exact:
        return summarize(sums)
    return summarize([replace(one, margins=()) for one in sums], LOWER_BOUND)


def served_model(server: str, wanted: str | None, option: str = "--model") -> dict[str, Any]:
    """The /v1/models entry whose name or directory is `wanted`; `option` is what the user gives."""
    cards = _ask(f"{server}/v1/models").get("data") or []
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
    try:
        answer = _ask(f"{server}/v1/completions", body)
    except ServerError as problem:
        if "logprobs" not in str(problem):
            raise
        advice = "start the server with a larger --max-logprobs (-1: all) or ask for fewer"
        raise ServerError(f"{problem}; {advice}") from problem
    positions = answer["choices"][0].get("prompt_logprobs")
    if positions is None or len(positions) != len(tokens):
        raise ServerError(f"{server}: answered without prompt_logprobs; expected a vLLM server")
    return [{int(i): e["logprob"] for i, e in position.items()} for position in positions[1:]]


def text_log_likelihood(server: str, model: str, text: str) -> float:
    """Log-probability, in nats, of all tokens of a text but the first."""
    body = {"model": model, "prompt": text, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
    answer = _ask(f"{server}/v1/completions", body)
    positions = answer["choices"][0].get("prompt_logprobs")
    if not positions:
        raise ServerError(f"{server}: answered without prompt_logprobs; expected a vLLM server")
    # With none asked for, the only one at each position is that of the text's own token.
    return math.fsum(entry["logprob"] for position in positions[1:] for entry in position.values())


def _ask(url: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
    return request_json(url, body, timeout=TIMEOUT, error_class=ServerError)


def _compare(base: Tensor, served: list[dict[int, float]], targets: Tensor) -> tuple[Sums, bool]:
    """Totals for base logits [n, vocab] and served log-probabilities; whether KL is exact."""
    vocabulary = base.shape[-1]
    nll, top1, exact, kl, shared = 0.0, 0, True, PartialKl(), 0.0
    margins: list[Tensor] = []
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
        log_p = logits.log_softmax(-1).double()
        some_p = log_p[list(position)]
        shared += torch.minimum(some_p, log_q).exp().sum().item()
        if whole:
            every = torch.empty_like(log_p)
            every[list(position)] = log_q
            margins.append(margin_ratios(log_p[None], every[None]))
        log_p[list(position)] = -math.inf
        kl += partial_kl(some_p, log_q, whole, log_p.max().item() - lowest(position, target))
        exact = exact and whole
    base_nll = token_nll(base, targets).double().sum().item()
    sums = Sums(nll, base_nll, kl.least, top1, len(targets), kl.most, shared, tuple(margins))
    return sums, exact


@dataclass(frozen=True)
class PartialKl:
    """The least and the most that KL is, where only some tokens are known; add other positions."""

    least: float = 0.0
    most: float = 0.0

    def __add__(self, other: PartialKl) -> PartialKl:
        return PartialKl(self.least + other.least, self.most + other.most)


def lowest(position: Mapping[int, float], target: int) -> float:
    """A log-probability that no token exceeds that a server did not return."""
    return min((lp for token, lp in position.items() if token != target), default=position[target])


def partial_kl(log_p: Tensor, log_q: Tensor, whole: bool, fallen: float = 0.0) -> PartialKl:
    """KL at one position over the tokens whose log-probabilities [n] are given, unless they are all
    with one more bucket for the others; `fallen` is what one of those is known to have lost."""
    some_p, some_q = log_p.double(), log_q.double()
    falls = (some_p - some_q).masked_fill(some_p == -math.inf, 0)
    kl = (some_p.exp() * falls).sum().item()
    rest_p = 1 - some_p.exp().sum().item()
    if whole or rest_p <= 0:
        return PartialKl(kl, kl)
    rest_q = max(1 - some_q.exp().sum().item(), LEAST_REMAINDER)
    all_others = math.log(rest_p / rest_q)
    worst = max([0.0, fallen, all_others, *falls.tolist()])
    return PartialKl(kl + rest_p * all_others, kl + rest_p * worst)
