"""What a comparison has measured so far: one line per finished prompt, written as it finishes.

The first line is a fingerprint of all that decides a measurement: prompts, options, both models.
The same command after a kill goes on behind the last whole line; another comparison in the same
directory is an error. Margins, prices and scorers are no part of it: they judge what was measured,
and may be changed on a finished comparison.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

from compress_methods.errors import OutputError
from compress_methods.system.journal_file import JournalFile
from compress_methods.system.lock import LOCK_FILE, DirectoryLock

JOURNAL = "journal.jsonl"


class Journal:
    """The directory of one comparison, locked for this process. Use as a context manager.

    `records[phase]` maps what was recorded in a phase to its line; `notes` are facts about the
    comparison. Where nothing was recorded, the place is left as it was found.
    """

    def __init__(self, directory: Path, fingerprint: str) -> None:
        self.directory = directory
        self.records: dict[str, dict[str, dict[str, Any]]] = {}
        self.notes: dict[str, Any] = {}
        self._created = not directory.exists()
        self._path = directory / JOURNAL
        # Not durable: a sync to disk would take time while requests are timed.
        self._file = JournalFile(self._path, durable=False)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._lock = DirectoryLock(directory)
        except BlockingIOError as problem:
            raise OutputError(f"{directory}: another process is comparing into it") from problem
        except OSError as problem:
            raise OutputError(f"{directory}: {problem.strerror}") from problem
        try:
            self._open(fingerprint)
        except BaseException:
            self._lock.close()
            raise

    def _open(self, fingerprint: str) -> None:
        """Begin a journal or read the one that is there."""
        if not self._path.exists():
            if any(path.name != LOCK_FILE for path in self.directory.iterdir()):
                raise OutputError(f"{self.directory}: not empty, and not an earlier comparison")
            self._file.append({"fingerprint": fingerprint})
            return
        lines = self._file.read().lines
        if not lines or lines[0].get("fingerprint") != fingerprint:
            raise OutputError(
                f"{self.directory}: holds a comparison of other prompts, options or models; "
                "choose another directory with -o or delete this one"
            )
        for line in lines[1:]:
            if "notes" in line:
                self.notes.update(line["notes"])
            else:
                self.records.setdefault(line["phase"], {})[line["key"]] = line

    def done(self, phase: str, key: object) -> bool:
        return str(key) in self.records.get(phase, {})

    def record(self, phase: str, key: object, **facts: Any) -> None:
        """Keep what was measured, safe from a kill of this process. (No fsync: requests are timed
        meanwhile.)"""
        line = {"phase": phase, "key": str(key), **facts}
        self._file.append(line)
        self.records.setdefault(phase, {})[str(key)] = line

    def note(self, **facts: Any) -> None:
        """Keep facts about the whole comparison."""
        self._file.append({"notes": facts})
        self.notes.update(facts)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._file.close()
        if not self.records:
            self._path.unlink()
            if self._created:
                self.directory.rmdir()
        self._lock.close()
