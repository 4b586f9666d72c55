"""The teacher's likeliest tokens at every place of the text, written down once.

While the student learns, the teacher is then in memory no more, and no step waits for it. The loss
is the KL of those k tokens and of all others taken as one (`losses.py`), as it is of the
log-probabilities that an endpoint gives. In the folder, of `PART` rows of the text each:

    part-00000.safetensors   tokens    int32   [rows, length, k]   the likeliest first
                             logprobs  float16 [rows, length, k]   their log-probabilities, nats

6 k bytes a token of text. A part that is there and whole is not computed again; a row is read from
the disk when it is its turn.

Fails where: k is small and the student is to learn what the teacher finds unlikely, too: others
count together, whichever they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress_methods.checkpoint.integrity import read_checked, write_checked
from compress_methods.checkpoint.safetensors import Entry, read_header
from compress_methods.system.processes import Processes
from compress_methods.system.progress import Progress
from compress_methods.training.lessons import TOKENS, TOP_LOGPROBS, TOP_TOKENS, Row

PART = 64
NAMES, VALUES = "tokens", "logprobs"


class Noted(Mapping[str, Tensor]):
    """A row with what was written down of it, read when asked for."""

    def __init__(self, row: Row, entries: Mapping[str, Entry], place: int) -> None:
        self.row, self.entries, self.place = row, entries, place

    def __getitem__(self, key: str) -> Tensor:
        if key == TOP_TOKENS:
            return self.entries[NAMES].read(self.place, 1)[0].long()
        if key == TOP_LOGPROBS:
            return self.entries[VALUES].read(self.place, 1)[0].float()
        return self.row[key]

    def __iter__(self) -> Iterator[str]:
        return iter((*self.row, TOP_TOKENS, TOP_LOGPROBS))

    def __len__(self) -> int:
        return len(self.row) + 2


def note_all(
    teacher: Any,
    rows: Sequence[Row],
    count: int,
    batch: int,
    folder: Path,
    progress: Progress,
    processes: Processes | None = None,
) -> list[Row]:
    """The rows, all of one length, with the `count` likeliest tokens of the teacher, which are in
    `folder` afterwards. `progress` counts rows. Several processes compute them together, for each
    may have but a share of the teacher; the first one writes."""
    processes = processes or Processes()
    folder.mkdir(exist_ok=True)
    found: list[Row] = []
    for first in range(0, len(rows), PART):
        some = rows[first : first + PART]
        path = folder / f"part-{first // PART:05d}.safetensors"
        if processes.first(partial(_is_missing, path)):
            told = _noted(teacher, some, count, batch)
            if processes.leads:
                write_checked(path, told)
            processes.wait()
        entries = read_header(path)
        found += [Noted(row, entries, place) for place, row in enumerate(some)]
        progress.step(len(some))
    return found


def _is_missing(path: Path) -> bool:
    return read_checked(path) is None


@torch.no_grad()
def _noted(teacher: Any, rows: Sequence[Row], count: int, batch: int) -> dict[str, Tensor]:
    names, values = [], []
    for tokens in torch.stack([row[TOKENS] for row in rows]).split(batch):
        logits = teacher(input_ids=tokens.to(teacher.device), use_cache=False).logits
        top = logits.float().log_softmax(-1).topk(count, -1)
        names.append(top.indices.int().cpu())
        values.append(top.values.half().cpu())
    return {NAMES: torch.cat(names), VALUES: torch.cat(values)}
