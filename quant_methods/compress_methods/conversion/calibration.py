"""Calibration sequences, from the user's text or from the model itself.

`load_tokens` samples and packs text: documents in an order drawn from the seed, joined by EOS and
cut; a single long text gives windows at random places instead. `sample_from_model` is the data-free
calibration of LLM-QAT (Liu et al. 2023, arXiv:2305.17888, section 2.1): a first token drawn at
random, the next few the likeliest ones, the rest sampled from the whole distribution.

Both give int64 [samples + held_out, length]. The last `held_out` rows are for measuring only; no
token of the text is in two rows. Where the tokenizer puts BOS before a text, every row starts with
it.

Fails where: the text is too short, or (without text) the model does not fit in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress_methods.errors import CalibrationError
from compress_methods.progress import Progress
from compress_methods.text import describe_file, encode, leading_bos, read_documents

GREEDY_TOKENS = 4
LONG_TEXT = 64
BLOCK = 16
MAX_BATCH = 128


@dataclass(frozen=True)
class CalibrationSettings:
    """The `calibration:` block of a recipe: how many sequences, of how many tokens each."""

    samples: int = 64
    length: int = 512
    seed: int = 0
    held_out: int = 8

    def __post_init__(self) -> None:
        for key, least in (("samples", 1), ("length", 8), ("seed", 0), ("held_out", 0)):
            value = getattr(self, key)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise CalibrationError(f"{key} is {value!r}, expected an integer from {least}")

    @property
    def rows(self) -> int:
        """Sequences in all, held-out ones included."""
        return self.samples + self.held_out


def describe(source: Path | None) -> str:
    """What the calibration data were, for reports: never where they lay."""
    return "sampled from the model itself" if source is None else describe_file(source)


def load_tokens(source: Path, tokenizer: Any, settings: CalibrationSettings) -> Tensor:
    """int64 [samples + held_out, length] from a .txt, .jsonl or .parquet file.

    The same file, tokenizer and settings give the same tokens. Raises `CalibrationError`.
    """
    documents = list(dict.fromkeys(read_documents(source, tokenizer)))
    bos = leading_bos(tokenizer)
    width = settings.length - (bos is not None)
    generator = torch.Generator().manual_seed(settings.seed)
    if len(documents) == 1:
        rows = _cut(documents[0], tokenizer, settings.rows, width, generator)
    else:
        rows = _pack(documents, tokenizer, settings.rows, width, generator)
    if len(rows) < settings.rows:
        raise CalibrationError(_too_short(source, documents, tokenizer, settings, width))
    return rows if bos is None else torch.nn.functional.pad(rows, (1, 0), value=bos)


def _pack(
    documents: list[str], tokenizer: Any, rows: int, width: int, generator: torch.Generator
) -> Tensor:
    """Up to `rows` rows of documents in random order, joined by EOS; the rest is not tokenized."""
    ids: list[int] = []
    for index in torch.randperm(len(documents), generator=generator).tolist():
        if len(ids) >= rows * width:
            break
        if ids and tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
        ids += encode(tokenizer, documents[index])
    rows = min(rows, len(ids) // width)
    return torch.tensor(ids[: rows * width], dtype=torch.int64).reshape(rows, width)


def _cut(text: str, tokenizer: Any, rows: int, width: int, generator: torch.Generator) -> Tensor:
    """Up to `rows` windows at random places of one text, none overlapping another."""
    if len(text) >= LONG_TEXT * rows * width:
        found = _cut_blocks(text, tokenizer, rows, width, generator)
        if len(found) == rows:
            return found
    ids = torch.tensor(encode(tokenizer, text), dtype=torch.int64)
    slots = len(ids) // width
    first = int(torch.randint(len(ids) - slots * width + 1, (1,), generator=generator))
    chosen = torch.randperm(slots, generator=generator)[:rows]
    return ids[first : first + slots * width].reshape(slots, width)[chosen]


def _cut_blocks(
    text: str, tokenizer: Any, rows: int, width: int, generator: torch.Generator
) -> Tensor:
    """The same from a text too long to tokenize whole: one window from each of random blocks."""
    size = BLOCK * width
    found: list[list[int]] = []
    for block in torch.randperm(len(text) // size, generator=generator).tolist():
        if len(found) == rows:
            break
        ids = encode(tokenizer, text[block * size : (block + 1) * size])
        if len(ids) >= width:
            found.append(ids[:width])
    return torch.tensor(found, dtype=torch.int64).reshape(len(found), width)


def _too_short(
    source: Path,
    documents: list[str],
    tokenizer: Any,
    settings: CalibrationSettings,
    width: int,
) -> str:
    """One line: tokens found, tokens needed, and what would fit."""
    separators = 0 if tokenizer.eos_token_id is None else len(documents) - 1
    found = sum(len(encode(tokenizer, document)) for document in documents) + separators
    samples = found // width - settings.held_out
    fits = f"samples: {samples} fits" if samples > 0 else "give more text or a smaller length"
    return (
        f"{source}: {found} tokens, expected {settings.rows * width} ({settings.samples} samples "
        f"and {settings.held_out} held-out sequences of {settings.length}); {fits}"
    )


def sample_from_model(
    model_dir: Path,
    tokenizer: Any,
    settings: CalibrationSettings,
    progress: Progress | None = None,
) -> Tensor:
    """int64 [samples + held_out, length] of text the model writes itself.

    `progress` counts generated tokens; its total is set here. The same model, settings and library
    versions give the same tokens, whatever the batch size up to rounding. Raises
    `CalibrationError` where the model does not fit in memory or takes no such length.
    """
    from compress_methods.evaluate import check_length
    from compress_methods.loading import load_model
    from compress_methods.memory import loading_dtype

    check_length(model_dir, settings.length)
    dtype = loading_dtype([model_dir], "give --calibration FILE")
    model = load_model(model_dir, dtype)
    config = model.config.get_text_config()
    banned = _banned_tokens(tokenizer, config.vocab_size)
    generator = torch.Generator().manual_seed(settings.seed)
    first = _first_tokens(banned, settings.rows, generator)
    bos = leading_bos(tokenizer)
    start = (
        first[:, None]
        if bos is None
        else torch.nn.functional.pad(first[:, None], (1, 0), value=bos)
    )
    draws = torch.rand(settings.rows, settings.length, generator=generator)
    if progress is not None:
        progress.total = settings.rows * settings.length
    batch = _batch_size(config, settings.length, dtype)
    parts = []
    for i in range(0, settings.rows, batch):
        rows = slice(i, i + batch)
        parts.append(_generate(model, start[rows], draws[rows], banned, progress))
    return torch.cat(parts)


def _banned_tokens(tokenizer: Any, vocabulary: int) -> Tensor:
    """bool [vocab]: special tokens, and the rows of a padded vocabulary that no token has."""
    banned = torch.ones(vocabulary, dtype=torch.bool)
    special = set(tokenizer.all_special_ids)
    special |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    known = [i for i in tokenizer.get_vocab().values() if i < vocabulary and i not in special]
    banned[known] = False
    return banned


def _first_tokens(banned: Tensor, rows: int, generator: torch.Generator) -> Tensor:
    """`rows` random tokens, all different where the vocabulary has as many."""
    allowed = (~banned).nonzero().flatten()
    rounds = -(-rows // len(allowed))
    orders = [torch.randperm(len(allowed), generator=generator) for _ in range(rounds)]
    return allowed[torch.cat(orders)[:rows]]


def _batch_size(config: Any, length: int, dtype: torch.dtype) -> int:
    """Sequences whose key-value cache takes a quarter of the free memory at most."""
    from compress_methods.memory import available_bytes

    free = available_bytes()
    if free is None:
        return MAX_BATCH
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * heads * size * dtype.itemsize
    per_token += 8 * config.vocab_size // length
    return int(max(1, min(MAX_BATCH, free // 4 // (per_token * length))))


@torch.inference_mode()
def _generate(
    model: Any, start: Tensor, draws: Tensor, banned: Tensor, progress: Progress | None
) -> Tensor:
    """Continue `start` [batch, 1 or 2] to [batch, length] with one uniform draw per token.

    Sampling inverts the cumulative distribution at the draw, so a row does not depend on the rows
    it is batched with.
    """
    length = draws.shape[1]
    tokens = torch.empty(len(start), length, dtype=torch.int64)
    tokens[:, : start.shape[1]] = start
    cache, new = None, start
    for position in range(start.shape[1], length):
        out = model(input_ids=new, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits = out.logits[:, -1].float().masked_fill(banned, -torch.inf)
        if position < start.shape[1] + GREEDY_TOKENS:
            new = logits.argmax(-1, keepdim=True)
        else:
            cumulative = logits.softmax(-1).double().cumsum(-1)
            at = draws[:, position, None].double() * cumulative[:, -1:]
            new = torch.searchsorted(cumulative, at, right=True)
        tokens[:, position] = new[:, 0]
        if progress is not None:
            progress.step(len(start))
    if progress is not None:
        progress.step(len(start) * start.shape[1])
    return tokens
