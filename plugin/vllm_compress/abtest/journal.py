"""What a comparison has measured so far: one line per finished prompt, written as it finishes.

The first line is a fingerprint of all that decides a measurement: prompts, options, both models.
The same command after a kill goes on behind the last whole line; another comparison in the same
directory is an error. Margins, prices and scorers are no part of it: they judge what was measured,
and may be changed on a finished comparison.
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from compress_methods.errors import OutputError
from compress_methods.files import write_text

JOURNAL = "journal.jsonl"


class Journal:
    """The directory of one comparison, locked for this process. Use as a context manager.

    `records[phase]` maps what was recorded in a phase to its line.
    """

    def __init__(self, directory: Path, fingerprint: str) -> None:
        self.directory = directory
        self.records: dict[str, dict[str, dict[str, Any]]] = {}
        self._path = directory / JOURNAL
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(directory, os.O_RDONLY)
        except OSError as problem:
            raise OutputError(f"{directory}: {problem.strerror}") from problem
        try:
            self._open(fingerprint)
        except BaseException:
            os.close(self._lock)
            raise

    def _open(self, fingerprint: str) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as problem:
            raise OutputError(
                f"{self.directory}: another process is comparing into it"
            ) from problem
        if not self._path.exists():
            if any(self.directory.iterdir()):
                raise OutputError(f"{self.directory}: not empty, and not an earlier comparison")
            write_text(self._path, json.dumps({"fingerprint": fingerprint}) + "\n")
            self._file = self._path.open("a", encoding="utf-8")
            return
        lines = self._read()
        if not lines or lines[0].get("fingerprint") != fingerprint:
            raise OutputError(
                f"{self.directory}: holds a comparison of other prompts, options or models; "
                "choose another directory with -o or delete this one"
            )
        for line in lines[1:]:
            self.records.setdefault(line["phase"], {})[line["key"]] = line
        # A kill may have left half a line at the end.
        write_text(self._path, "".join(json.dumps(line) + "\n" for line in lines))
        self._file = self._path.open("a", encoding="utf-8")

    def _read(self) -> list[dict[str, Any]]:
        lines = []
        for text in self._path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                lines.append(json.loads(text))
            except ValueError:
                break
        return lines

    def done(self, phase: str, key: object) -> bool:
        return str(key) in self.records.get(phase, {})

    def record(self, phase: str, key: object, **facts: Any) -> None:
        """Keep what was measured, safe from a kill of this process. (No fsync: requests are timed
        meanwhile.)"""
        line = {"phase": phase, "key": str(key), **facts}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        self.records.setdefault(phase, {})[str(key)] = line

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._file.close()
        os.close(self._lock)
