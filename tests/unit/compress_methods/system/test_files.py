"""Files that come along are durable, and a directory has one owner whatever its file system."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compress_methods.system import lock
from compress_methods.system.files import copy_file, write_picture
from compress_methods.system.lock import LOCK_FILE, DirectoryLock


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what is fsynced and renamed, in order."""
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def record(descriptor: int) -> None:
        events.append("fsync " + Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def rename(self: Path, target: Path) -> Path:
        events.append(f"rename {self.name}")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr(Path, "replace", rename)
    return events


class Figure:
    """Draws a few bytes."""

    def savefig(self, file: Any, **_: Any) -> None:
        file.write(b"picture")


@pytest.mark.parametrize("write", ["copy", "picture"])
def test_what_comes_along_is_on_disk_before_it_has_its_name(
    write: str, tmp_path: Path, synced: list[str]
) -> None:
    path = tmp_path / "folder" / "file"
    path.parent.mkdir()
    if write == "copy":
        (tmp_path / "original").write_bytes(b"picture")
        copy_file(tmp_path / "original", path)
    else:
        write_picture(path, Figure())
    assert path.read_bytes() == b"picture"
    assert synced == ["fsync file.tmp", "rename file.tmp", "fsync folder"]
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def refusing(number: int, directories: bool) -> Callable[[int, int], None]:
    """flock as a file system has it that locks no directories, or nothing."""
    flock = fcntl.flock

    def locked(descriptor: int, how: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) or not directories:
            raise OSError(number, os.strerror(number))
        flock(descriptor, how)

    return locked


@pytest.mark.parametrize("number", [None, errno.EBADF, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_directory_has_one_owner_where_directories_cannot_be_locked(
    number: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if number is not None:
        monkeypatch.setattr(lock.fcntl, "flock", refusing(number, True))
    first = DirectoryLock(tmp_path)
    assert (tmp_path / LOCK_FILE).exists() == (number is not None)
    with pytest.raises(BlockingIOError):
        DirectoryLock(tmp_path)
    first.close()
    assert not list(tmp_path.iterdir())
    DirectoryLock(tmp_path).close()


def test_a_file_system_without_locks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock.fcntl, "flock", refusing(errno.ENOLCK, False))
    with pytest.raises(OSError, match="cannot lock files") as caught:
        DirectoryLock(tmp_path)
    assert caught.value.filename == str(tmp_path)
