"""The output directory while a conversion runs: who owns it, what is done, what comes next.

    .incomplete            there from the first moment until everything has been verified
    .work/journal.jsonl    a header with the job's fingerprint, then one line per finished shard
    .work/*.safetensors    calibration tokens; activations at the next block's input

Every file is written under another name and renamed; a line is journaled only after its file is
durable; activations are replaced only after that line is. So a kill at any moment loses at most the
shard that was being worked on; what is damaged meanwhile is made again (recovery.py). The directory
is locked, and freed by the kernel.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from compress_methods.checkpoint.compressed import INCOMPLETE, read_json
from compress_methods.checkpoint.integrity import REPORT as REPORT
from compress_methods.checkpoint.integrity import read_checked, write_checked
from compress_methods.checkpoint.integrity import sha256 as sha256
from compress_methods.errors import OutputError
from compress_methods.system.files import fsync_directory
from compress_methods.system.journal_file import JournalFile
from compress_methods.system.lock import LOCK_FILE, DirectoryLock
from compress_methods.system.processes import Processes

WORK = ".work"
JOURNAL = "journal.jsonl"


class Journal:
    """An output directory, locked for this process. `finished` maps shard names to their lines.

    Of several `processes` the first alone has the directory; the others know what it tells them,
    and hand it their shares of the activations.
    """

    def __init__(
        self, directory: Path, fingerprint: str, processes: Processes | None = None
    ) -> None:
        self.directory = directory
        self.work = directory / WORK
        self.fingerprint = fingerprint
        self.finished: dict[str, dict[str, Any]] = {}
        self.complete = False
        self.processes = processes or Processes()
        if self.processes.leads:
            self._open()
        self.tell()

    def _open(self) -> None:
        directory = self.directory
        self._file = JournalFile(self.work / JOURNAL)
        self._created = not directory.exists()
        directory.mkdir(parents=True, exist_ok=True)
        try:
            self._lock = DirectoryLock(directory)
        except BlockingIOError as problem:
            raise OutputError(f"{directory}: another process is converting into it") from problem
        try:
            self._take()
        except BaseException:
            self.close()
            raise

    def _take(self) -> None:
        if (self.directory / INCOMPLETE).exists():
            self._resume()
        elif (self.directory / REPORT).exists():
            found = read_json(self.directory / REPORT).get("fingerprint")
            self._require_same(found)
            self.complete = True
            shutil.rmtree(self.work, ignore_errors=True)
        elif any(path.name != LOCK_FILE for path in self.directory.iterdir()):
            raise OutputError(
                f"{self.directory}: not empty, and not the output of an earlier conversion"
            )
        else:
            (self.directory / INCOMPLETE).touch()
            fsync_directory(self.directory)
            self._begin()

    def _begin(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()
        self._file.append({"fingerprint": self.fingerprint, "created": self._created})

    def _resume(self) -> None:
        lines = self._file.read().lines
        if not lines:
            self._begin()
            return
        self._require_same(lines[0].get("fingerprint"))
        self._created = bool(lines[0].get("created"))
        for line in lines[1:]:
            for shard in line.get("forget", ()):
                self.finished.pop(shard, None)
            if "shard" in line:
                self.finished[line["shard"]] = line
        for leftover in [*self.directory.glob("*.tmp"), *self.work.glob("*.tmp")]:
            leftover.unlink()

    def _require_same(self, found: str | None) -> None:
        if found != self.fingerprint:
            raise OutputError(
                f"{self.directory}: holds the result of another model, recipe or calibration text; "
                "choose another output directory or delete this one"
            )

    def tell(self) -> None:
        """Have all processes know what is finished."""
        self.complete, self.finished = self.processes.agree((self.complete, self.finished))

    def record(self, shard: str, file: str, facts: Mapping[str, Any]) -> None:
        """Journal a shard whose file is in place."""

        def append() -> dict[str, Any]:
            line = {"shard": shard, "file": file, "sha256": sha256(self.directory / file), **facts}
            self._file.append(line)
            return line

        self.finished[shard] = self.processes.first(append)

    def holds(self, shard: str) -> bool:
        """Whether the file of a finished shard is as it was written."""
        path = self.directory / self.finished[shard]["file"]
        return path.is_file() and sha256(path) == self.finished[shard]["sha256"]

    def forget(self, shards: Iterable[str]) -> None:
        """Have finished shards be made again."""
        names = sorted(set(shards) & self.finished.keys())
        self._file.append({"forget": names})
        for name in names:
            del self.finished[name]

    def reopen(self, lines: Iterable[Mapping[str, Any]] = ()) -> None:
        """Take up a finished result again; `lines` are of the shards that stay as they are."""
        (self.directory / INCOMPLETE).touch()
        fsync_directory(self.directory)
        self._begin()
        self.complete = False
        for line in lines:
            self._file.append(line)
            self.finished[line["shard"]] = dict(line)

    def save_states(self, index: int, states: Mapping[str, Tensor]) -> None:
        """Keep the activations at the input of block `index`."""
        for rank, mine in self.processes.collected(states):
            write_checked(self._states(index, rank), mine)

    def load_states(self, index: int) -> dict[str, Tensor] | None:
        """This process's activations at the input of block `index`; None where damaged or not
        there."""
        return read_checked(self._states(index, self.processes.rank))

    def keeps_states(self, index: int) -> bool:
        """Whether those of all processes are as they were written."""
        paths = [self._states(index, rank) for rank in range(self.processes.count)]
        return all(read_checked(path) is not None for path in paths)

    def saved_index(self) -> int | None:
        """The furthest block that activations are kept for."""
        found = self.work.glob("activations-*.safetensors")
        return max(map(_index, found), default=None)

    def drop_states(self, below: int) -> None:
        """Delete the activations of earlier blocks."""
        for path in self.work.glob("activations-*.safetensors") if self.processes.leads else ():
            if _index(path) < below:
                path.unlink()

    def _states(self, index: int, rank: int) -> Path:
        own = f"-{rank}" if self.processes.count > 1 else ""
        return self.work / f"activations-{index:05d}{own}.safetensors"

    def finish(self) -> None:
        """Everything is written and verified: remove the traces of the work."""
        self._file.close()
        (self.directory / INCOMPLETE).unlink()
        fsync_directory(self.directory)
        shutil.rmtree(self.work)

    def abandon(self) -> None:
        """If no shard was finished yet, leave the place as it was found."""
        if self.processes.leads and not self.finished and not self.complete:
            self.discard()

    def discard(self) -> None:
        """Leave the place as it was found; no finished shard may lie outside the work folder."""
        for leftover in self.directory.glob("*.tmp"):
            leftover.unlink()
        shutil.rmtree(self.work, ignore_errors=True)
        (self.directory / INCOMPLETE).unlink(missing_ok=True)
        if self._created:
            (self.directory / LOCK_FILE).unlink(missing_ok=True)
            self.directory.rmdir()

    def close(self) -> None:
        """Release the lock."""
        if self.processes.leads:
            self._file.close()
            self._lock.close()


def _index(states: Path) -> int:
    """The block that a file of activations is for."""
    return int(states.stem.split("-")[1])
