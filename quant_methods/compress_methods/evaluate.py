"""How far a compressed model is from its original, on a text.

    perplexity       exp of the mean negative log-likelihood of the text's tokens
    kl               mean over predicted tokens of KL(original || compressed), nats per token
    top1_agreement   share of positions where both models find the same token likeliest

The text is cut into windows that do not overlap; every token of a window but its first is
predicted from those before it in the window. Logits are compared in float32 whatever the models
computed in, a few rows at a time, so that a vocabulary of 128k needs no more memory than one of 4k.

Fails where: the two models do not share a vocabulary, or both do not fit in memory together; then
serve the compressed one and use `compress_methods.evaluate_served`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress_methods.compressed import read_json
from compress_methods.errors import CalibrationError, CheckpointError
from compress_methods.progress import Progress

CHUNK_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Evaluation:
    """Means over `tokens` predicted tokens.

    `kl_kind` is `exact`, or `lower_bound` where only part of the vocabulary could be compared.
    """

    perplexity: float
    base_perplexity: float
    kl: float
    top1_agreement: float
    tokens: int
    kl_kind: str = "exact"

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, its keys those of the fields; a value that is not finite becomes None."""
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in asdict(self).items()
        }


@dataclass(frozen=True)
class Sums:
    """Totals over `tokens` predicted tokens; add those of several batches, then `result()`.

    `nll`, `base_nll` and `kl` are in nats, `top1` counts positions where both models agree.
    """

    nll: float = 0.0
    base_nll: float = 0.0
    kl: float = 0.0
    top1: int = 0
    tokens: int = 0

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            self.nll + other.nll,
            self.base_nll + other.base_nll,
            self.kl + other.kl,
            self.top1 + other.top1,
            self.tokens + other.tokens,
        )

    def result(self, kl_kind: str = "exact") -> Evaluation:
        """Means of the totals; raises `ValueError` without any token."""
        if not self.tokens:
            raise ValueError("no predicted tokens")
        return Evaluation(
            perplexity=_exp(self.nll / self.tokens),
            base_perplexity=_exp(self.base_nll / self.tokens),
            kl=self.kl / self.tokens if math.isnan(self.kl) else max(0.0, self.kl / self.tokens),
            top1_agreement=self.top1 / self.tokens,
            tokens=self.tokens,
            kl_kind=kl_kind,
        )


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 or math.isnan(nats) else math.inf


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood in nats, float32 [n], of `targets` [n] under `logits` [n, vocab]."""
    parts = [_nll(logits[i:j].float(), targets[i:j]) for i, j in _chunks(logits)]
    return torch.cat(parts) if parts else logits.new_zeros(0, dtype=torch.float32)


def token_kl(base_logits: Tensor, logits: Tensor) -> Tensor:
    """KL(base || other) in nats, float32 [n], of the distributions of two logits [n, vocab]."""
    _same_shape(base_logits, logits)
    parts = [_kl(base_logits[i:j].float(), logits[i:j].float()) for i, j in _chunks(logits)]
    return torch.cat(parts) if parts else logits.new_zeros(0, dtype=torch.float32)


def compare_logits(base: Tensor, other: Tensor, targets: Tensor) -> Sums:
    """Totals for `base` and `other` logits [n, vocab], any float dtype, and true tokens [n].

    Position i of the logits predicts `targets[i]`: shift before the call. Raises `ValueError` on
    shapes that differ.
    """
    _same_shape(base, other)
    sums = Sums()
    for i, j in _chunks(base):
        b, o, t = base[i:j].float(), other[i:j].float(), targets[i:j]
        sums += Sums(
            nll=_nll(o, t).double().sum().item(),
            base_nll=_nll(b, t).double().sum().item(),
            kl=_kl(b, o).double().sum().item(),
            top1=int((b.argmax(-1) == o.argmax(-1)).sum()),
            tokens=j - i,
        )
    return sums


def _nll(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none")


def _kl(base: Tensor, other: Tensor) -> Tensor:
    log_p, log_q = base.log_softmax(-1), other.log_softmax(-1)
    terms = log_p.exp() * (log_p - log_q)
    return terms.masked_fill_(log_p == -math.inf, 0).sum(-1)


def _chunks(logits: Tensor) -> Iterator[tuple[int, int]]:
    """[first, last) row ranges whose float32 logits take at most `CHUNK_BYTES`."""
    rows = max(1, CHUNK_BYTES // (4 * max(1, logits.shape[-1])))
    for first in range(0, len(logits), rows):
        yield first, min(first + rows, len(logits))


def _same_shape(base: Tensor, other: Tensor) -> None:
    if base.shape != other.shape:
        raise ValueError(f"logits are {list(base.shape)} and {list(other.shape)}, expected equal")


def evaluate(
    model_dir: str | Path,
    base_dir: str | Path,
    text_path: str | Path,
    *,
    length: int = 512,
    limit_tokens: int | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Compare a model with its original on a .txt, .jsonl or .parquet file, without a server.

    The text is cut into windows of `length` tokens by the original's tokenizer; `limit_tokens`
    keeps the first so many. `progress` counts tokens; its total is set here. Raises
    `CheckpointError` or `CalibrationError`.
    """
    from compress_methods.loading import load_model
    from compress_methods.memory import loading_dtype
    from compress_methods.text import windows

    model_path, base_path = Path(model_dir), Path(base_dir)
    advice = "serve the compressed model with vLLM and give --url"
    dtype = loading_dtype([base_path, model_path], advice)
    tokenizer = load_tokenizer(base_path)
    check_vocabulary(tokenizer, load_tokenizer(model_path), base_path, model_path)
    check_length(base_path, length)
    texts = windows(Path(text_path), tokenizer, length, limit_tokens)
    base, model = load_model(base_path, dtype), load_model(model_path, dtype)
    sums = Sums()
    if progress is not None:
        progress.total = sum(len(window) for window in texts)
    for window in texts:
        expected, found = next_token_logits(base, window), next_token_logits(model, window)
        if expected.shape != found.shape:
            raise CheckpointError(
                f"{model_path}: {found.shape[-1]} logits per token, expected {expected.shape[-1]}"
            )
        sums += compare_logits(expected, found, window[1:])
        if progress is not None:
            progress.step(len(window))
    return sums.result()


@torch.inference_mode()
def next_token_logits(model: Any, window: Tensor) -> Tensor:
    """[n - 1, vocab] logits for all tokens but the first of `window` [n]."""
    logits: Tensor = model(input_ids=window[None], use_cache=False).logits[0, :-1]
    return logits


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer of a checkpoint directory; raises `CheckpointError`."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as problem:  # transformers and tokenizers raise many kinds here
        reason = " ".join(str(problem).split())[:200]
        raise CheckpointError(f"{directory}: has no usable tokenizer ({reason})") from problem


def check_vocabulary(base: Any, other: Any, base_path: Path, path: Path) -> None:
    """Raise `CheckpointError` unless two tokenizers give every token the same id."""
    expected, found = base.get_vocab(), other.get_vocab()
    different = sum(found.get(token) != i for token, i in expected.items())
    different += len(found.keys() - expected.keys())
    if different:
        raise CheckpointError(
            f"{path}: {different} of {len(found)} tokens differ from those of {base_path}; "
            "expected the same tokenizer"
        )


def check_length(directory: Path, length: int) -> None:
    """Raise `CalibrationError` where windows of `length` are longer than the model's context."""
    config = read_json(directory / "config.json")
    config = config.get("text_config") or config
    positions = config.get("max_position_embeddings") or config.get("n_positions")
    if isinstance(positions, int) and length > positions:
        raise CalibrationError(
            f"length is {length}, but {directory.name} takes {positions} tokens; give fewer"
        )
