"""Log-likelihoods of continuations, as lm-evaluation-harness defines them.

Context and continuation are tokenized together, white space at the end of the context counting as
the continuation's; what is too long for the model loses its beginning. BOS comes first where the
tokenizer itself puts one, and EOS stands in for a context that is empty.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compress_methods.calibration.text import encode
from compress_methods.calibration.tokenizer import context_length, leading_bos, load_tokenizer
from compress_methods.errors import CalibrationError
from compress_methods.evaluation.streamed import StreamedModel
from compress_methods.system.progress import Progress


def log_likelihoods(
    model: StreamedModel,
    base: Path,
    pairs: Sequence[tuple[str, str]],
    progress: Progress | None = None,
) -> list[tuple[float, bool]]:
    """For every (context, continuation) its log-likelihood in nats, and whether each of its tokens
    is the likeliest there. Tokens are those of the tokenizer in `base`; `CalibrationError` where a
    continuation alone is longer than the model's context."""
    tokenizer, limit = load_tokenizer(base), context_length(base)
    bos = leading_bos(tokenizer)
    # Continuations of one token share a row with their context: only the look-up differs.
    rows: dict[tuple[int, ...], int] = {}
    asked: dict[int, list[tuple[int, list[int]]]] = defaultdict(list)
    for number, (context, continuation) in enumerate(pairs):
        row, after = _tokens(tokenizer, bos, context, continuation)
        if limit is not None and len(after) > limit:
            raise CalibrationError(
                f"{continuation!r:.40}: {len(after)} tokens, the model takes {limit}"
            )
        row = row[-limit:] if limit is not None else row
        asked[rows.setdefault(tuple(row), len(rows))].append((number, after))
    found = [(0.0, False)] * len(pairs)
    for index, logits in model.logits(list(rows), progress):
        for number, after in asked[index]:
            last = logits[-len(after) :]
            likely = last.log_softmax(-1)[range(len(after)), after].double().sum()
            found[number] = float(likely), last.argmax(-1).tolist() == after
    return found


def _tokens(
    tokenizer: Any, bos: int | None, context: str, continuation: str
) -> tuple[list[int], list[int]]:
    """The tokens to read and those to predict, the last of them from the end of what is read."""
    trimmed = context.rstrip()
    before = encode(tokenizer, trimmed) if trimmed else []
    whole = encode(tokenizer, trimmed + context[len(trimmed) :] + continuation)
    after = whole[len(before) :] or whole[-1:]
    lead = [] if bos is None else [bos]
    if not before and not lead:
        lead = [tokenizer.eos_token_id or 0]
    return [*lead, *whole[:-1]], after
