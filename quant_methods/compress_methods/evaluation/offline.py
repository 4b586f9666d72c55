"""How far a compressed model is from its original, on a text. A causal language model:

    perplexity       exp of the mean negative log-likelihood of the text's tokens
    kl               mean over predicted tokens of KL(original || compressed), nats per token
    top1_agreement   share of positions where both models find the same token likeliest
    acceptance       1 - total variation, and margin_ratio: `metrics.py` defines them

The text is cut into windows that do not overlap; every token of a window but its first is
predicted from those before it in the window. Of a masked language model the same is said where
tokens were hidden (`masked.py`); encoders without a head are judged by their embeddings
(`embeddings.py`), classifiers by their labels (`classes.py`).

Fails where: the two models do not share a vocabulary, or both do not fit in memory together; then
serve the compressed one and use `compress_methods.evaluation.served`.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress_methods.calibration.text import require_text, windows
from compress_methods.calibration.tokenizer import check_length, check_vocabulary, load_tokenizer
from compress_methods.checkpoint.loading.kv_cache import read_scales, rounded_cache
from compress_methods.checkpoint.loading.model import load_model
from compress_methods.errors import CheckpointError
from compress_methods.evaluation.fit import loading_dtype
from compress_methods.evaluation.metrics import Sums
from compress_methods.evaluation.outputs.judge import Judge, Outcome
from compress_methods.evaluation.outputs.masked import Mask, compare_masked
from compress_methods.model.architecture import architecture_of
from compress_methods.model.device import AUTO, resolve_device
from compress_methods.model.task import SAME_TOKEN, STATES
from compress_methods.system.progress import Progress


def evaluate(
    model_dir: str | Path,
    base_dir: str | Path,
    text_path: str | Path,
    *,
    length: int = 512,
    limit_tokens: int | None = None,
    progress: Progress | None = None,
    device: str = AUTO,
    kv_cache: str | None = None,
) -> Outcome:
    """Compare a model with its original on a .txt, .jsonl or .parquet file, without a server.

    The text is cut into windows of `length` tokens by the original's tokenizer; `limit_tokens`
    keeps the first so many. `progress` counts tokens; its total is set here. Models run on `device`
    (`auto`, `cpu`, `cuda:N`). `kv_cache`: `fp8` or `fp8-cpu`, where the model has the keys and
    values that such a cache with its scales gives. Raises `CheckpointError` or `CalibrationError`.
    """
    model_path, base_path = Path(model_dir), Path(base_dir)
    place = resolve_device(device)
    scales = read_scales(model_path) if kv_cache else {}
    require_text(Path(text_path))
    advice = "serve the compressed model with vLLM and give --url"
    dtype = loading_dtype([base_path, model_path], advice)
    tokenizer = load_tokenizer(base_path)
    check_vocabulary(tokenizer, load_tokenizer(model_path), base_path, model_path)
    check_length(base_path, length)
    texts = windows(Path(text_path), tokenizer, length, limit_tokens)
    base, model = (load_model(path, dtype, place) for path in (base_path, model_path))
    architecture = architecture_of(base.config)
    judge = Judge.of(architecture, base_path)
    mask = Mask(tokenizer) if architecture.loss == SAME_TOKEN else None
    sums: list[Sums | float] = []
    if progress is not None:
        progress.total = sum(len(window) for window in texts)
    for window in texts:
        tokens, places = (window, None) if mask is None else mask.hide(window)
        expected = outputs(base, tokens)
        with rounded_cache(model, scales, kv_cache) if kv_cache else nullcontext():
            found = outputs(model, tokens)
        if expected.shape != found.shape:
            what = "values per embedding" if architecture.loss == STATES else "logits per token"
            raise CheckpointError(
                f"{model_path}: {found.shape[-1]} {what}, expected {expected.shape[-1]}"
            )
        if places is None:
            sums.append(judge.compare(expected, found, window))
        else:
            sums.append(compare_masked(expected, found, window, places))
        if progress is not None:
            progress.step(len(window))
    return judge.result(sums)


@torch.inference_mode()
def outputs(model: Any, window: Tensor) -> Tensor:
    """Logits of a text's tokens `window` [n], [n, vocab or labels] or [labels] of the whole, or its
    last hidden states [n, hidden] of a model without a head, in main memory."""
    if architecture_of(model.config).loss != STATES:
        return all_logits(model, window)
    states: Tensor = model(input_ids=window[None].to(model.device)).last_hidden_state[0]
    return states.cpu()


@torch.no_grad()  # not inference_mode: what gathers its parameters keeps room for them
def all_logits(model: Any, window: Tensor) -> Tensor:
    """[n, vocab] logits at all tokens of `window` [n], in main memory."""
    logits: Tensor = model(input_ids=window[None].to(model.device), use_cache=False).logits[0]
    return logits.cpu()


def next_token_logits(model: Any, window: Tensor) -> Tensor:
    """[n - 1, vocab] logits for all tokens but the first of `window` [n]."""
    return all_logits(model, window)[:-1]
