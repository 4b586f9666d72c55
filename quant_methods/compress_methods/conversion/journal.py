"""The output directory while a conversion runs: who owns it, what is done, what comes next.

    .incomplete            there from the first moment until everything has been verified
    .work/journal.jsonl    a header with the job's fingerprint, then one line per finished unit
    .work/*.safetensors    calibration tokens; activations at the next block's input

Every file is written under another name and renamed; a line is journaled only after its file is
durable; activations are replaced only after that line is. So a kill at any moment loses at most the
unit that was being worked on. The directory itself is locked, and freed by the kernel.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from compress_methods.compressed import INCOMPLETE, read_json
from compress_methods.errors import OutputError
from compress_methods.files import fsync_directory, write_text
from compress_methods.safetensors_io import read_tensors, write_tensors

WORK = ".work"
JOURNAL = "journal.jsonl"
REPORT = "report.json"
CHUNK = 2**22


class Journal:
    """An output directory, locked for this process. `finished` maps unit names to their lines."""

    def __init__(self, directory: Path, fingerprint: str) -> None:
        self.directory = directory
        self.work = directory / WORK
        self.fingerprint = fingerprint
        self.finished: dict[str, dict[str, Any]] = {}
        self.complete = False
        self._created = not directory.exists()
        directory.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(directory, os.O_RDONLY)
        try:
            self._take()
        except BaseException:
            self.close()
            raise

    def _take(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as problem:
            raise OutputError(
                f"{self.directory}: another process is converting into it"
            ) from problem
        if (self.directory / INCOMPLETE).exists():
            self._resume()
        elif (self.directory / REPORT).exists():
            found = read_json(self.directory / REPORT).get("fingerprint")
            self._require_same(found)
            self.complete = True
            shutil.rmtree(self.work, ignore_errors=True)
        elif any(self.directory.iterdir()):
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
        write_text(self.work / JOURNAL, json.dumps({"fingerprint": self.fingerprint}) + "\n")

    def _resume(self) -> None:
        path = self.work / JOURNAL
        if not path.exists():
            self._begin()
            return
        lines = []
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except ValueError:
                break
        self._require_same(lines[0].get("fingerprint") if lines else None)
        self.finished = {line["unit"]: line for line in lines[1:]}
        write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
        for leftover in [*self.directory.glob("*.tmp"), *self.work.glob("*.tmp")]:
            leftover.unlink()

    def _require_same(self, found: str | None) -> None:
        if found != self.fingerprint:
            raise OutputError(
                f"{self.directory}: holds the result of another model, recipe or calibration text; "
                "choose another output directory or delete this one"
            )

    def record(self, unit: str, file: str, facts: Mapping[str, Any]) -> None:
        """Journal a unit whose file is in place."""
        line = {"unit": unit, "file": file, "sha256": sha256(self.directory / file), **facts}
        with (self.work / JOURNAL).open("a", encoding="utf-8") as journal:
            journal.write(json.dumps(line) + "\n")
            journal.flush()
            os.fsync(journal.fileno())
        self.finished[unit] = line

    def save_states(self, index: int, states: Mapping[str, Tensor]) -> None:
        """Keep the activations at the input of block `index`."""
        write_tensors(self._states(index), states)

    def load_states(self, index: int) -> dict[str, Tensor] | None:
        path = self._states(index)
        return read_tensors(path) if path.exists() else None

    def saved_index(self) -> int | None:
        """The furthest block that activations are kept for."""
        found = self.work.glob("activations-*.safetensors")
        return max((int(path.stem.partition("-")[2]) for path in found), default=None)

    def drop_states(self, below: int) -> None:
        """Delete the activations of earlier blocks."""
        for path in self.work.glob("activations-*.safetensors"):
            if int(path.stem.partition("-")[2]) < below:
                path.unlink()

    def _states(self, index: int) -> Path:
        return self.work / f"activations-{index:05d}.safetensors"

    def finish(self) -> None:
        """Everything is written and verified: remove the traces of the work."""
        (self.directory / INCOMPLETE).unlink()
        fsync_directory(self.directory)
        shutil.rmtree(self.work)

    def abandon(self) -> None:
        """If no unit was finished yet, leave the place as it was found."""
        if not self.finished and not self.complete:
            self.discard()

    def discard(self) -> None:
        """Leave the place as it was found; no finished unit may lie outside the work folder."""
        for leftover in self.directory.glob("*.tmp"):
            leftover.unlink()
        shutil.rmtree(self.work, ignore_errors=True)
        (self.directory / INCOMPLETE).unlink(missing_ok=True)
        if self._created:
            self.directory.rmdir()

    def close(self) -> None:
        """Release the lock."""
        os.close(self._lock)


def sha256(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
