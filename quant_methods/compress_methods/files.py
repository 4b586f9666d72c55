"""Writing files so that a reader finds the old one or the whole new one, never a part."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Atomically write a small text file."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        fsync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def fsync_directory(path: Path) -> None:
    """Make renames in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_picture(path: Path, figure: Any) -> None:
    """Atomically write a matplotlib figure as PNG, the same bytes whenever it is drawn."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        figure.savefig(temporary, format="png", dpi=150, metadata={"Software": None})
        temporary.replace(path)
        fsync_directory(path.absolute().parent)
    finally:
        temporary.unlink(missing_ok=True)
