"""Writing files so that a reader finds the old one or the whole new one, never a part."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


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


def copy_file(source: Path, path: Path) -> None:
    """Atomically copy a file's contents."""
    with source.open("rb") as original, replacing(path) as file:
        shutil.copyfileobj(original, file)


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
