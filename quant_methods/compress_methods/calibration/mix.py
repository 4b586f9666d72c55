"""Calibration sequences from one file or several.

Of several, each gives sequences in proportion to its weight: its exact share, rounded so that they
add up. The order is drawn from the seed, so that any batch or half of the held-out sequences has a
bit of everything. A document that a file before has too is left out, so no token is in two
sequences here either. Fails where a file is too short for its share, or its share is no sequence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from compress_methods.calibration.settings import CalibrationSettings
from compress_methods.calibration.text import read_file
from compress_methods.calibration.tokens import cut_documents, text_name
from compress_methods.errors import CalibrationError


@dataclass(frozen=True)
class FileFacts:
    """What a file gave, for reports. `documents`: of text in it; `rendered`: those that are chats
    in the tokenizer's chat template; `joined`: chats as plain text, as it has no template."""

    name: str
    weight: float
    sequences: int
    held_out_sequences: int
    documents: int
    rendered: int
    joined: int


def load_files(tokenizer: Any, settings: CalibrationSettings) -> tuple[Tensor, list[FileFacts]]:
    """int64 [samples + held_out, length] from `settings.files`, and what each of them gave.

    The same files, tokenizer and settings give the same tokens. Raises `CalibrationError`.
    """
    files = settings.files
    weights = [file.weight for file in files]
    both = apportion(settings.samples, weights), apportion(settings.held_out, weights)
    parts, facts = [], []
    seen: set[str] = set()
    for file, samples, held_out in zip(files, *both, strict=True):
        if samples == 0:
            raise CalibrationError(
                f"{file.path}: weight {file.weight:g} of {sum(weights):g} is none of "
                f"{settings.samples} samples; give it a larger weight, or more samples"
            )
        found = read_file(file.path, tokenizer, join_chats=True)
        texts = [text for text in found.texts if text not in seen]
        if not texts:
            raise CalibrationError(f"{file.path}: holds no text that another file does not hold")
        seen.update(texts)
        own = replace(settings, samples=samples, held_out=held_out)
        parts.append(cut_documents(file.path, texts, tokenizer, own, len(files) > 1))
        counts = (len(found.texts), found.rendered, found.joined)
        facts.append(
            FileFacts(text_name(file.path), float(file.weight), samples, held_out, *counts)
        )
    return (parts[0] if len(parts) == 1 else _mixed(parts, facts, settings.seed)), facts


def apportion(count: int, weights: Sequence[float]) -> list[int]:
    """`count` divided in proportion to weights, the largest remainders rounded up, the first of
    equal ones before others."""
    total = math.fsum(weights)
    exact = [count * (weight / total) for weight in weights]
    shares = [math.floor(share) for share in exact]
    order = sorted(range(len(weights)), key=lambda i: shares[i] - exact[i])
    for i in order[: count - sum(shares)]:
        shares[i] += 1
    return shares


def _mixed(parts: Sequence[Tensor], facts: Sequence[FileFacts], seed: int) -> Tensor:
    """The sequences to calibrate on in random order, then those held out."""
    generator = torch.Generator().manual_seed(seed)
    both = zip(parts, facts, strict=True)
    split = [(part[: f.sequences], part[f.sequences :]) for part, f in both]
    found = []
    for rows in (torch.cat([first for first, _ in split]), torch.cat([last for _, last in split])):
        found.append(rows[torch.randperm(len(rows), generator=generator)])
    return torch.cat(found)


def files_name(facts: Sequence[FileFacts]) -> str:
    """What the files were, for reports, with their weights where those differ."""
    differ = len({f.weight for f in facts}) > 1
    return ", ".join(f"{f.name} × {f.weight:g}" if differ else f.name for f in facts)
