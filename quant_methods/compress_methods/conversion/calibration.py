"""Calibration sequences from the user's text; `sampling` has the model write its own.

Documents are taken in an order drawn from the seed, joined by EOS and cut; a single long text gives
windows at random places instead. The result is int64 [samples + held_out, length]. The last
`held_out` rows are for measuring only; no token of the text is in two rows. Where the tokenizer
puts BOS before a text, every row starts with it. Fails where the text is too short.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress_methods.errors import CalibrationError
from compress_methods.text import describe_file, encode, leading_bos, read_documents

LONG_TEXT = 64
BLOCK = 16


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
