"""A file of JSON objects, one a line, that only grows and outlives a kill at any moment.

Each line ends in a CRC-32 of the rest, so that a flipped bit is seen as well as half a line.
Damage ends a journal: what follows a damaged line may build on it, so all of it is dropped.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

from compress_methods.system.files import fsync_directory

CHECKSUM = "crc32"


class Contents(NamedTuple):
    """The whole lines of a journal, and how many were dropped from the first damaged one on."""

    lines: list[dict[str, Any]]
    dropped: int


class JournalFile:
    """One writer's journal; whoever uses it keeps other writers away.

    Once `append` returns, a line survives a crash of the machine with `durable`, and only a kill of
    this process without, which is quicker. The first `append` makes the file, or cuts off what is
    damaged. Use as a context manager, or call `close`.
    """

    def __init__(self, path: Path, *, durable: bool = True) -> None:
        self.path = path
        self._durable = durable
        self._file: BinaryIO | None = None

    def read(self) -> Contents:
        """All whole lines from the start, without their checksums; none where there is no file."""
        lines, _, dropped = self._scan()
        return Contents(lines, dropped)

    def append(self, line: Mapping[str, Any]) -> None:
        """Write a line with string keys behind the last whole one."""
        data = _encode(line)
        file = self._open()
        end = file.tell()
        try:
            written = 0
            while written < len(data):  # unbuffered, so a write may be short
                written += file.write(data[written:])
            if self._durable:
                os.fsync(file.fileno())
        except BaseException:  # such as a full disk: leave no half line for the next to join
            file.truncate(end)
            file.seek(end)
            raise

    def close(self) -> None:
        """Close the file. Harmless when repeated; `append` opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> JournalFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()

    def _open(self) -> BinaryIO:
        """The file, at the end of its last whole line, where it ends by then."""
        if self._file is None:
            _, size, _ = self._scan()
            fresh = not self.path.exists()
            file = self.path.open("wb" if fresh else "r+b", buffering=0)
            file.truncate(size)
            file.seek(size)
            if fresh and self._durable:
                fsync_directory(self.path.absolute().parent)
            self._file = file
        return self._file

    def _scan(self) -> tuple[list[dict[str, Any]], int, int]:
        """Whole lines, their bytes, and how many lines follow them."""
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            data = b""
        pieces = data.splitlines(keepends=True)
        lines: list[dict[str, Any]] = []
        size = 0
        for piece in pieces:
            line = _decode(piece)
            if line is None:
                break
            lines.append(line)
            size += len(piece)
        return lines, size, len(pieces) - len(lines)


def _encode(line: Mapping[str, Any]) -> bytes:
    """A line with its checksum; raises `ValueError` where it would not be read back as it is."""
    if CHECKSUM in line or not all(isinstance(key, str) for key in line):
        raise ValueError(f"keys {list(line)}: expected strings other than {CHECKSUM!r}")
    checksum = zlib.crc32(json.dumps(line).encode())
    return json.dumps({**line, CHECKSUM: checksum}).encode() + b"\n"


def _decode(piece: bytes) -> dict[str, Any] | None:
    """What `_encode` made `piece` of; None where a bit of it is not as it was."""
    try:
        line: dict[str, Any] = json.loads(piece)
        del line[CHECKSUM]
        # All bytes, for a flipped bit may leave the meaning as it is.
        return line if _encode(line) == piece else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
