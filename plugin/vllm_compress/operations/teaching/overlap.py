"""Training text that the test set holds, too: runs of n words that both have.

A text overlaps with the held-out one where it has n words in a row with it, letters' case and all
between words aside (n = 13 as in GPT-3's report, Brown et al. 2020, appendix C). A question of
fewer words overlaps where it is a whole question of the held-out file. Answers of fewer words never
do: "4" is the answer to many questions.

Fails where: the same is said in other words.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from compress_methods.calibration.rows import Chat, read_row
from compress_methods.calibration.text import decode, jsonl_rows
from compress_methods.errors import CompressError
from compress_methods.system.user_file import require_path
from vllm_compress.operations.teaching.seeds import QUESTIONS, SeedsError, read_seed
from vllm_compress.operations.teaching.similarity import words

SUFFIXES = (".jsonl", ".txt")


class HeldOut:
    """What a test set says, as runs of `n` words and whole short questions."""

    def __init__(self, n: int) -> None:
        self._n = n
        self._runs: set[int] = set()

    def add(self, text: str, question: bool) -> None:
        """Take in a text of the test set."""
        self._runs.update(self._runs_of(text, question))

    def overlaps(self, question: str, answer: str = "") -> bool:
        """Tell whether a question, or an answer to it, says what the test set says."""
        runs = (*self._runs_of(question, True), *self._runs_of(answer, False))
        return any(run in self._runs for run in runs)

    def _runs_of(self, text: str, question: bool) -> Iterator[int]:
        """Hashes, for the words themselves would fill the memory."""
        found = words(text)
        if question and 0 < len(found) < self._n:
            yield hash((True, *found))
        for i in range(len(found) - self._n + 1):
            yield hash(tuple(found[i : i + self._n]))


def read_held_out(path: Path, n: int) -> HeldOut:
    """A test set: .txt, or a .jsonl of seeds or of rows that `eval` reads; a `CompressError` names
    file and line."""
    require_path(path, SeedsError)
    if path.suffix not in SUFFIXES:
        raise SeedsError(
            f"{path}: ends in {path.suffix or 'nothing'!r}, expected {' or '.join(SUFFIXES)}"
        )
    if not path.is_file():
        raise SeedsError(f"{path}: no such file")
    found = HeldOut(n)
    if path.suffix == ".txt":
        found.add(decode(path.read_bytes(), str(path)), True)
        return found
    for where, row in jsonl_rows(path):
        for text, question in _texts(row, where):
            found.add(text, question)
    return found


def _texts(row: Any, where: str) -> Iterator[tuple[str, bool]]:
    """The texts of a row, and whether each is a question."""
    if isinstance(row, Mapping) and any(row.get(key) is not None for key in QUESTIONS):
        try:
            seed = read_seed(row, where)
        except CompressError:  # such as a chat with tools, which no seed may be
            pass
        else:
            yield seed.question, True
            yield from ((m["content"], False) for m in seed.messages[:-1])
            yield seed.answer or "", False
            return
    found = read_row(row, where)
    if isinstance(found, Chat):
        yield from ((str(m["content"]), m["role"] == "user") for m in found.messages)
    else:
        yield found, True
