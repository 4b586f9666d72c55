"""Writing files so that a reader finds the old one or the whole new one, never a part."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from compress_methods.errors import OutputError


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that becomes `path` at the end, whole and on disk; nothing after an error."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        fsync_directory(path.absolute().parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Atomically write a small text file."""
    with replacing(path) as file:
        file.write(text.encode("utf-8"))


def write_changed(path: Path, text: str) -> bool:
    """The same where the file has another text or is not there; tell whether it was written."""
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return False
    write_text(path, text)
    return True


def copy_file(source: Path, path: Path) -> None:
    """Atomically copy a file's contents."""
    with source.open("rb") as original, replacing(path) as file:
        shutil.copyfileobj(original, file)


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A directory to fill that becomes `path` at the end; nothing after an error, and what a run
    that was killed has left beside it goes. `OutputError` where `path` exists."""
    if path.exists():
        raise OutputError(f"{path}: exists already")
    unfinished = path.with_name(f".{path.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        unfinished.rename(path)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def fsync_directory(path: Path) -> None:
    """Make renames in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_picture(path: Path, figure: Any) -> None:
    """Atomically write a matplotlib figure as PNG, the same bytes whenever it is drawn."""
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=150, metadata={"Software": None})


def finite(value: Any) -> Any:
    """The value with None for what JSON has no number for."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
