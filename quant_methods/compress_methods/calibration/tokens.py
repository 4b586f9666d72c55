"""Calibration sequences from the user's text; `sampling` has the model write its own.

Documents are taken in an order drawn from the seed, joined by EOS and cut; a single long text gives
windows at random places instead. The result is int64 [samples + held_out, length]. The last
`held_out` rows are for measuring only; no token of the text is in two rows. Where the tokenizer
puts BOS before a text, every row starts with it. Fails where the text is too short.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress_methods.calibration.settings import CalibrationSettings
from compress_methods.calibration.text import (
    append_document,
    describe_file,
    encode,
    read_documents,
)
from compress_methods.calibration.tokenizer import leading_bos
from compress_methods.errors import CalibrationError

LONG_TEXT = 64
BLOCK = 16


def text_name(source: Path | None) -> str:
    """What the calibration data were, for reports: never where they lay."""
    return "sampled from the model itself" if source is None else describe_file(source)


def load_tokens(source: Path, tokenizer: Any, settings: CalibrationSettings) -> Tensor:
    """int64 [samples + held_out, length] from a .txt, .jsonl or .parquet file.

    The same file, tokenizer and settings give the same tokens. Raises `CalibrationError`.
    """
    return cut_documents(source, read_documents(source, tokenizer), tokenizer, settings)


def cut_documents(
    source: Path,
    texts: Sequence[str],
    tokenizer: Any,
    settings: CalibrationSettings,
    share: bool = False,
) -> Tensor:
    """The same from documents of `source`; `share`: they are one part of a mix."""
    documents = list(dict.fromkeys(texts))
    bos = leading_bos(tokenizer)
    width = settings.length - (bos is not None)
    generator = torch.Generator().manual_seed(settings.seed)
    if len(documents) == 1:
        rows = _cut(documents[0], tokenizer, settings.rows, width, generator)
    else:
        rows = _pack(documents, tokenizer, settings.rows, width, generator)
    if len(rows) < settings.rows:
        found = _too_short(documents, tokenizer, settings, width, share)
        raise CalibrationError(f"{source}: {found}")
    return rows if bos is None else torch.nn.functional.pad(rows, (1, 0), value=bos)


def _pack(
    documents: list[str], tokenizer: Any, rows: int, width: int, generator: torch.Generator
) -> Tensor:
    """Up to `rows` rows of documents in random order, joined by EOS; the rest is not tokenized."""
    ids: list[int] = []
    for index in torch.randperm(len(documents), generator=generator).tolist():
        if len(ids) >= rows * width:
            break
        append_document(ids, documents[index], tokenizer)
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
    documents: list[str], tokenizer: Any, settings: CalibrationSettings, width: int, share: bool
) -> str:
    """Tokens found, tokens needed, and what would fit."""
    ids: list[int] = []
    for document in documents:
        append_document(ids, document, tokenizer)
    samples = len(ids) // width - settings.held_out
    fits = f"samples: {samples} fits" if samples > 0 else "give more text or a smaller length"
    if share:
        fits = "its share of the mix; give it more text or a smaller weight"
    return (
        f"{len(ids)} tokens, expected {settings.rows * width} ({settings.samples} samples "
        f"and {settings.held_out} held-out sequences of {settings.length}); {fits}"
    )
