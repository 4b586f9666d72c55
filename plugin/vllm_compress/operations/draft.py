"""Self-speculation: a smaller version of a model writes tokens ahead, and the model checks them.

vLLM's `draft_model` takes any checkpoint of the same vocabulary and keeps what the model itself
would have said (Leviathan et al., 2023, arXiv:2211.17192), so nothing is lost but memory. Where
reading weights takes the time, a draft of c times the model's bytes that guesses a token right with
probability a (`acceptance`, 1 - total variation) makes, k tokens ahead,

    (1 - a^(k + 1)) / (1 - a)   tokens in the time of   1 + k c   of the model's own steps;

the best k is taken where nobody says another; `plan --draft` finds it by the number of requests
(`capacity/throughput/speculation.py` has the sums of both). a is what the draft's conversion
measured on held-out text, against the model that it was made from. Fails where vocabularies differ;
wins nothing where products take the time: with many requests at once.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress_methods.checkpoint.compressed import read_json
from compress_methods.errors import CheckpointError, CompressError
from vllm_compress.metrics.checkpoint_summary import quantization_method, summarize_checkpoint
from vllm_compress.operations.capacity.drafts import measured_acceptance
from vllm_compress.operations.capacity.throughput.speculation import (
    Schedule,
    best_ahead,
    read_schedule,
    tokens_per_step,
    written,
)

OPTION, METHOD = "speculative-config", "draft_model"
BY_BATCH, LAST = "num_speculative_tokens_per_batch_size", 2**16
UNMEASURED_AHEAD, UNKNOWN_COST = 3, 0.5
TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class Draft:
    """Who writes ahead, how many tokens; `acceptance` and `expected` tokens per step of one request
    alone if known."""

    path: Path
    schedule: Schedule
    acceptance: float | None = None
    expected: float | None = None

    def options(self) -> list[str]:
        """As `vllm serve` takes them."""
        said: dict[str, Any] = {
            "method": METHOD,
            "model": str(self.path),
            "num_speculative_tokens": max(ahead for _, ahead in self.schedule),
        }
        if len(self.schedule) > 1:
            ends = [first - 1 for first, _ in self.schedule[1:]] + [LAST]
            each = zip(self.schedule, ends, strict=True)
            said[BY_BATCH] = [[first, end, ahead] for (first, ahead), end in each]
        return [f"--{OPTION}", json.dumps(said)]

    def line(self) -> str:
        """What the operator is told."""
        known = "its acceptance was not measured"
        if self.acceptance is not None and self.expected is not None:
            known = f"{self.acceptance:.0%} accepted, {self.expected:.1f} tokens a step expected"
        return f"{self.path}: writes {written(self.schedule)} tokens ahead; {known}"


def make_draft(model: str, draft: str, tokens: int | str | None, options: Collection[str]) -> Draft:
    """The draft of a model, both directories; `options` are those that vLLM gets besides."""
    if OPTION in options:
        raise CompressError(f"--draft and --{OPTION} say the same; give one of them")
    schedule = None if tokens is None else read_schedule(str(tokens), "--draft-tokens")
    path, whole = (Path(name).expanduser() for name in (draft, model))
    if not path.is_dir():
        raise CheckpointError(f"--draft: {draft} is no directory")
    if whole.is_dir():
        _require_same_vocabulary(whole, path)
    acceptance = measured_acceptance(path)
    if acceptance is None:
        return Draft(path, schedule or ((1, UNMEASURED_AHEAD),))
    sizes = [
        summarize_checkpoint(str(p), quantization_method(p)).weight_bytes for p in (path, whole)
    ]
    cost = sizes[0] / sizes[1] if sizes[0] and sizes[1] else UNKNOWN_COST
    schedule = schedule or ((1, best_ahead(acceptance, lambda ahead: 1 + ahead * cost)),)
    return Draft(path, schedule, acceptance, tokens_per_step(acceptance, schedule[0][1]))


def draft_in(options: Sequence[str]) -> list[str]:
    """The directory of the draft that `Draft.options` among vLLM's name, if there is one."""
    name = f"--{OPTION}"
    if name not in options[:-1]:
        return []
    try:
        said = json.loads(options[options.index(name) + 1])
        found = said["model"] if said["method"] == METHOD else None
    except (ValueError, KeyError, TypeError):  # vLLM will say what is wrong with it
        return []
    return [found] if isinstance(found, str) else []


def _require_same_vocabulary(model: Path, draft: Path) -> None:
    sizes = [_vocabulary(read_json(path / "config.json")) for path in (model, draft)]
    if sizes[0] != sizes[1]:
        raise CheckpointError(
            f"--draft: {draft} has a vocabulary of {sizes[1]}, {model} one of {sizes[0]}"
        )
    files = [path / TOKENIZER for path in (model, draft)]
    if all(file.is_file() for file in files) and _tokens(files[0]) != _tokens(files[1]):
        raise CheckpointError(f"--draft: {files[1]} names other tokens than {files[0]}")


def _vocabulary(config: dict[str, Any]) -> Any:
    return config.get("vocab_size", config.get("text_config", {}).get("vocab_size"))


def _tokens(file: Path) -> Any:
    """Which number each token has."""
    found = read_json(file)
    return found.get("model", {}).get("vocab"), found.get("added_tokens")
