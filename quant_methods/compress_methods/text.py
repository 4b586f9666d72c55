"""Text files as documents, documents as tokens.

.txt is one document; every line of a .jsonl and every row of a .parquet is one, in `text`, or a
chat in `messages`, which goes through the tokenizer's own chat template. Empty documents are left
out. Everything is read at once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress_methods.errors import CalibrationError

COLUMNS = ("text", "messages")


def read_documents(path: Path, tokenizer: Any) -> list[str]:
    """The documents of a .txt, .jsonl or .parquet file; raises `CalibrationError`."""
    readers: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]] = {
        ".txt": _text_rows,
        ".jsonl": jsonl_rows,
        ".parquet": _parquet_rows,
    }
    if path.suffix not in readers:
        raise CalibrationError(
            f"{path}: ends in {path.suffix or 'nothing'!r}, expected {', '.join(readers)}"
        )
    if not path.is_file():
        raise CalibrationError(f"{path}: no such file")
    rows = readers[path.suffix](path)
    documents = [document for where, row in rows if (document := _document(row, where, tokenizer))]
    if not documents:
        raise CalibrationError(f"{path}: holds no text")
    return documents


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
            except ValueError as problem:
                raise CalibrationError(f"{where}: not JSON ({problem})") from problem


def decode(raw: bytes, where: str) -> str:
    """UTF-8 text; raises `CalibrationError` naming `where`."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as problem:
        raise CalibrationError(f"{where}: not UTF-8 (byte {problem.start})") from problem


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow.parquet
    except ImportError as problem:
        raise CalibrationError(
            f"{path}: reading it needs pyarrow; pip install 'vllm-compress[parquet]'"
        ) from problem
    try:
        file = pyarrow.parquet.ParquetFile(path)
        columns = [name for name in file.schema_arrow.names if name in COLUMNS]
        if not columns:
            found = ", ".join(file.schema_arrow.names)
            raise CalibrationError(f"{path}: columns are {found}, expected text or messages")
        number = 0
        for batch in file.iter_batches(columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}: row {number}", row
    except (pyarrow.ArrowException, OSError) as problem:
        raise CalibrationError(f"{path}: not readable as parquet ({problem})") from problem


def _document(row: Any, where: str, tokenizer: Any) -> str:
    """The text of one row; empty where it has none to give."""
    if not isinstance(row, Mapping):
        raise CalibrationError(f"{where}: expected an object, found {type(row).__name__}")
    if row.get("messages") is not None:
        return _chat(row["messages"], where, tokenizer)
    if "text" not in row:
        raise CalibrationError(f"{where}: has neither text nor messages")
    text = row["text"]
    if text is not None and not isinstance(text, str):
        raise CalibrationError(f"{where}: text is {type(text).__name__}, expected a string")
    return text if text and text.strip() else ""


def _chat(messages: Any, where: str, tokenizer: Any) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise CalibrationError(
            f"{where}: has messages, but the tokenizer has no chat template; use text instead"
        )
    if not isinstance(messages, list) or not all(
        isinstance(m, Mapping) and {"role", "content"} <= m.keys() for m in messages
    ):
        raise CalibrationError(f"{where}: messages is not a list of objects with role and content")
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as problem:  # templates raise errors of their own for chats they refuse
        reason = str(problem).splitlines()[0] if str(problem) else type(problem).__name__
        raise CalibrationError(
            f"{where}: the chat template refuses these messages ({reason})"
        ) from problem


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of `text`, no special tokens around them."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def leading_bos(tokenizer: Any) -> int | None:
    """The BOS token where the tokenizer itself puts it before a text, else None."""
    bos = tokenizer.bos_token_id
    ids = tokenizer("a")["input_ids"]
    return bos if bos is not None and ids and ids[0] == bos else None


def windows(path: Path, tokenizer: Any, length: int, limit: int | None = None) -> list[Tensor]:
    """A file's tokens in order, as int64 sequences of at most `length`, for evaluation.

    Documents are joined by EOS. Each sequence starts with BOS where the tokenizer puts one before
    a text. `limit` keeps the first so many tokens; a last sequence that predicts nothing is left
    out. Raises `CalibrationError`.
    """
    bos, eos = leading_bos(tokenizer), tokenizer.eos_token_id
    lead = [] if bos is None else [bos]
    step = length - len(lead)
    if step < 1 or length < 2:
        raise CalibrationError(f"length is {length}, expected at least {2 + len(lead)}")
    ids: list[int] = []
    for document in read_documents(path, tokenizer):
        if ids and eos is not None:
            ids.append(eos)
        ids += encode(tokenizer, document)
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
