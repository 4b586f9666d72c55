"""What a long run of requests has got so far: one line per answer, written as it comes.

The first line is a fingerprint of all that decides an answer: prompts, options, models. The same
command after a kill goes on behind the last whole line; another run in the same directory is an
error. What only judges the answers, such as margins, prices and scorers, is no part of it, and may
be changed on a finished run.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from compress_methods.errors import OutputError
from compress_methods.system.journal_file import JournalFile
from compress_methods.system.lock import LOCK_FILE, DirectoryLock

JOURNAL = "journal.jsonl"
HEAD = b'{"fingerprint": '


class Words(NamedTuple):
    """How a command speaks of its journal, in errors."""

    doing: str
    earlier: str
    held: str
    others: str
    instead: str


COMPARISON = Words(
    doing="comparing into it",
    earlier="an earlier comparison",
    held="a comparison",
    others="prompts, options or models",
    instead="choose another directory with -o or delete this one",
)


class Journal:
    """The directory of one run, locked for this process. Use as a context manager.

    `records[phase]` maps what was recorded in a phase to its line; `notes` are facts about the
    run. A `fingerprint` that is a mapping lets an error name what differs. Where nothing was
    recorded, the place is left as it was found. `durable`: each line is on disk before the next,
    which takes time, and survives a crash of the machine.
    """

    def __init__(
        self,
        directory: Path,
        fingerprint: str | Mapping[str, Any],
        words: Words = COMPARISON,
        *,
        durable: bool = False,
    ) -> None:
        self.directory, self._words = directory, words
        self.records: dict[str, dict[str, dict[str, Any]]] = {}
        self.notes: dict[str, Any] = {}
        self._created = not directory.exists()
        self._path = directory / JOURNAL
        self._file = JournalFile(self._path, durable=durable)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._lock = DirectoryLock(directory)
        except BlockingIOError as problem:
            raise OutputError(f"{directory}: another process is {words.doing}") from problem
        except OSError as problem:
            raise OutputError(f"{directory}: {problem.strerror}") from problem
        try:
            self._open(fingerprint)
        except BaseException:
            self._lock.close()
            raise

    def _open(self, fingerprint: str | Mapping[str, Any]) -> None:
        """Begin a journal or read the one that is there."""
        if not self._path.exists() or self._hardly_begun():
            if any(path.name not in (LOCK_FILE, JOURNAL) for path in self.directory.iterdir()):
                raise OutputError(f"{self.directory}: not empty, and not {self._words.earlier}")
            self._file.append({"fingerprint": fingerprint})
            return
        lines = self._file.read().lines
        known = lines[0].get("fingerprint") if lines else None
        if known != fingerprint:
            others = _differing(known, fingerprint) or self._words.others
            raise OutputError(
                f"{self.directory}: holds {self._words.held} of other {others}; "
                f"{self._words.instead}"
            )
        for line in lines[1:]:
            if "notes" in line:
                self.notes.update(line["notes"])
            else:
                self.records.setdefault(line["phase"], {})[line["key"]] = line

    def _hardly_begun(self) -> bool:
        """Tell whether a kill left no more of the journal than a part of its first line."""
        with self._path.open("rb") as file:
            line = file.readline()
        return not line.endswith(b"\n") and (HEAD.startswith(line) or line.startswith(HEAD))

    def done(self, phase: str, key: object) -> bool:
        return str(key) in self.records.get(phase, {})

    def record(self, phase: str, key: object, **facts: Any) -> None:
        """Keep an answer, safe from a kill of this process."""
        line = {"phase": phase, "key": str(key), **facts}
        self._file.append(line)
        self.records.setdefault(phase, {})[str(key)] = line

    def note(self, **facts: Any) -> None:
        """Keep facts about the whole run."""
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


def _differing(known: Any, wanted: Any) -> str:
    """Name the keys of two fingerprints whose values differ; empty where they have no keys."""
    if not isinstance(known, Mapping) or not isinstance(wanted, Mapping):
        return ""
    keys = [key for key in {**known, **wanted} if known.get(key) != wanted.get(key)]
    return " and ".join(filter(None, [", ".join(keys[:-1]), *keys[-1:]]))
