"""What a training reads: rows of tokens to learn from, to stop by and to report on.

A row is a mapping of tensors: the tokens [n], and where not all of them are to be learnt

    counted       bool [n]: whether the token at a place is part of an answer
    top_tokens    int64 [n, k] and top_logprobs float32 [n, k]: what a teacher found likeliest at a
                  place, -inf where it named fewer than k

Text is cut into rows of one length, all of which counts. Where the loss is that of single tokens
and the file holds questions with answers, each of them is a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from compress_methods.calibration.tokenizer import load_tokenizer
from compress_methods.calibration.tokens import text_name
from compress_methods.conversion.job import Text, check_calibration
from compress_methods.conversion.journal import sha256
from compress_methods.recipe.training import Training
from compress_methods.training.lessons import (
    COUNTED,
    TOKENS,
    TOP_LOGPROBS,
    TOP_TOKENS,
    Row,
    holds_lessons,
    read_lessons,
)

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Material:
    """`rows`: to learn from, to stop by and to report on, in this order; None where the teacher is
    yet to write them. `text`: what they are, for reports and fingerprints."""

    text: Text
    rows: list[Row] | None


def read_material(directory: Path, settings: Training) -> Material:
    """What `settings` name, with the tokenizer of `directory`; raises `CalibrationError`."""
    if settings.by_token and not settings.writes_itself:
        path = Path(settings.data)
        if holds_lessons(path):
            rows = read_lessons(path, load_tokenizer(directory), settings)
            return Material(Text(source=text_name(path), identity=sha256(path)), rows)
    text = check_calibration(directory, settings.text, settings.data)
    return Material(text, None if text.tokens is None else plain_rows(text.tokens))


def plain_rows(tokens: Tensor) -> list[Row]:
    """Those of [rows, length] tokens."""
    return [{TOKENS: row} for row in tokens]


def collate(rows: Sequence[Row]) -> dict[str, Tensor]:
    """One batch: shorter rows are filled up behind, where nothing counts and nothing is read."""
    longest = max(len(row[TOKENS]) for row in rows)
    found = {TOKENS: torch.stack([_longer(row[TOKENS], longest, 0) for row in rows])}
    if COUNTED in rows[0]:
        found[COUNTED] = torch.stack([_longer(row[COUNTED], longest, False) for row in rows])
    if TOP_TOKENS in rows[0]:
        most = max(row[TOP_TOKENS].shape[1] for row in rows)
        for name, fill in ((TOP_TOKENS, 0), (TOP_LOGPROBS, -torch.inf)):
            found[name] = torch.stack([_wider(row[name], longest, most, fill) for row in rows])
    return found


def _longer(row: Tensor, length: int, fill: float) -> Tensor:
    return torch.nn.functional.pad(row, (0, length - len(row)), value=fill)


def _wider(row: Tensor, length: int, count: int, fill: float) -> Tensor:
    rest = (0, count - row.shape[1], 0, length - len(row))
    return torch.nn.functional.pad(row, rest, value=fill)
