"""Text files as documents, documents as tokens.

.txt is one document; every line of a .jsonl and every row of a .parquet is one, as `rows.py` knows
them. Chats go through the tokenizer's own chat template, as `chat.py` says. Empty documents are
left out. Everything is read at once; a byte-order mark is no text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress_methods.calibration.chat import has_template, join, render
from compress_methods.calibration.rows import COLUMNS, EXPECTED, KINDS, read_row
from compress_methods.calibration.tokenizer import leading_bos, require_known
from compress_methods.errors import CalibrationError

SUFFIXES = (".txt", ".jsonl", ".parquet")
ENDING = 2
"""EOS among the last so many tokens ends a document; templates put a newline after it."""


@dataclass(frozen=True)
class Documents:
    """The texts of a file. `rendered`: how many are chats in the tokenizer's template; `joined`:
    how many are chats whose messages were joined, for want of a template."""

    texts: list[str]
    rendered: int
    joined: int


def require_text(path: Path) -> None:
    """Refuse a file that could not be read, before minutes are spent on loading models."""
    if path.suffix not in SUFFIXES:
        raise CalibrationError(
            f"{path}: ends in {path.suffix or 'nothing'!r}, expected {', '.join(SUFFIXES)}"
        )
    if not path.is_file():
        raise CalibrationError(f"{path}: no such file")


def read_documents(path: Path, tokenizer: Any) -> list[str]:
    """The documents of a .txt, .jsonl or .parquet file; raises `CalibrationError`."""
    return read_file(path, tokenizer).texts


def read_file(path: Path, tokenizer: Any, join_chats: bool = False) -> Documents:
    """The same with counts of chats. `join_chats`: what is said in a chat becomes one text where
    the tokenizer has no chat template, which is refused otherwise."""
    readers: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]] = {
        ".txt": _text_rows,
        ".jsonl": jsonl_rows,
        ".parquet": _parquet_rows,
    }
    require_text(path)
    joins = join_chats and not has_template(tokenizer)
    texts, chats = [], 0
    for where, row in readers[path.suffix](path):
        found = read_row(row, where)
        if isinstance(found, str):
            text = found
        elif joins or not found.messages:
            text = join(found)
        else:
            text = render(found, where, tokenizer)
        if text.strip():
            texts.append(text)
            chats += not isinstance(found, str)
    if not texts:
        raise CalibrationError(f"{path}: holds no text")
    return Documents(texts, 0 if joins else chats, chats if joins else 0)


def _text_rows(path: Path) -> Iterator[tuple[str, Any]]:
    yield str(path), {"text": decode(path.read_bytes(), str(path))}


def jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Every line that is not empty: `path:number` and its JSON value."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                yield where, json.loads(decode(line, where))
            except (ValueError, RecursionError) as problem:
                raise CalibrationError(f"{where}: not JSON ({problem})") from problem


def decode(raw: bytes, where: str) -> str:
    """UTF-8 text; raises `CalibrationError` naming `where`."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise CalibrationError(f"{where}: not UTF-8 (byte {problem.start})") from problem


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow.parquet
    except ImportError as problem:
        raise CalibrationError(
            f"{path}: reading it needs pyarrow; pip install pyarrow"
        ) from problem
    try:
        file = pyarrow.parquet.ParquetFile(path)
        columns = [name for name in file.schema_arrow.names if name in COLUMNS]
        if not any(set(columns) >= set(kind) for kind in KINDS):
            found = ", ".join(file.schema_arrow.names)
            raise CalibrationError(f"{path}: columns are {found}, expected {EXPECTED}")
        number = 0
        for batch in file.iter_batches(columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}: row {number}", row
    except (pyarrow.ArrowException, OSError) as problem:
        raise CalibrationError(f"{path}: not readable as parquet ({problem})") from problem


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of `text`, no special tokens around them; raises `CheckpointError` where the model
    of the tokenizer does not know one."""
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    require_known(ids, tokenizer)
    return ids


def append_document(ids: list[int], text: str, tokenizer: Any) -> None:
    """Add a document's tokens, after an EOS unless the document before ends with one."""
    eos = tokenizer.eos_token_id
    if ids and eos is not None and eos not in ids[-ENDING:]:
        ids.append(eos)
    ids += encode(tokenizer, text)


def windows(path: Path, tokenizer: Any, length: int, limit: int | None = None) -> list[Tensor]:
    """A file's tokens in order, as int64 sequences of at most `length`, for evaluation.

    Documents are joined by EOS. Each sequence starts with BOS where the tokenizer puts one before
    a text. `limit` keeps the first so many tokens; a last sequence that predicts nothing is left
    out. Raises `CalibrationError`.
    """
    bos = leading_bos(tokenizer)
    lead = [] if bos is None else [bos]
    step = length - len(lead)
    if step < 1 or length < 2:
        raise CalibrationError(f"length is {length}, expected at least {2 + len(lead)}")
    ids: list[int] = []
    for document in read_documents(path, tokenizer):
        append_document(ids, document, tokenizer)
        if limit is not None and len(ids) >= limit:
            break
    ids = ids[:limit]
    cut = [lead + ids[i : i + step] for i in range(0, len(ids), step)]
    sequences = [torch.tensor(window) for window in cut if len(window) > 1]
    if not sequences:
        raise CalibrationError(f"{path}: {len(ids)} tokens, too few to predict one")
    return sequences


def describe_file(path: Path) -> str:
    """File name and the start of its SHA-256: which text it was, not where it lay."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return f"{path.name} (sha256 {digest[:12]})"
