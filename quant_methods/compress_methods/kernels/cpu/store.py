"""Where compiled libraries lie: a folder that only its owner writes, checked before use.

What is loaded from here runs in the user's process, so nothing is taken that somebody else could
have put there; and a library cut short (a full disk, a crash) would kill the process while it is
loaded, so its SHA-256 lies beside it and is compared first. `StoreError` says in one line why there
is no using the folder.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from compress_methods.names import CACHE_VARIABLE
from compress_methods.system.files import fsync_directory

OURS_ALONE, READ_BY_ALL = 0o700, 0o755
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
POLL_SECONDS = 0.1


class StoreError(OSError):
    """A folder, or a file in it, that must not be used."""


def cache_directory() -> Path:
    """`VLLM_COMPRESS_CACHE`, or a folder in the user's cache."""
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen)
    try:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as problem:  # a user that the machine does not know
        raise StoreError(f"user {os.getuid()} has no home directory") from problem
    return Path(home) / "vllm-compress"


def own(folder: Path) -> None:
    """Make the folder if need be; refuse one that others can write to.

    One in the user's cache is for that user alone. One that was named may be an image's, which
    root fills and other users read.
    """
    named = bool(os.environ.get(CACHE_VARIABLE))
    mode = READ_BY_ALL if named else OURS_ALONE
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=mode, exist_ok=True)
    found = folder.stat()
    if not named and found.st_uid == os.getuid() and stat.S_IMODE(found.st_mode) != mode:
        folder.chmod(mode)
        found = folder.stat()
    _check_owner(found, folder)


def _check_owner(found: os.stat_result, path: Path) -> None:
    if found.st_uid not in (0, os.getuid()):
        raise StoreError(f"{path} belongs to user {found.st_uid}")
    if found.st_mode & OTHERS_WRITE:
        raise StoreError(f"{path} can be written by others (chmod go-w)")


def holds(path: Path) -> bool:
    """Whether the library is there, whole; `StoreError` if it is not safe to load."""
    try:
        _check_owner(path.parent.stat(), path.parent)
        contents, said = _read(path), _read(_sum_of(path))
    except (FileNotFoundError, NotADirectoryError):
        return False
    return hashlib.sha256(contents).hexdigest().encode() == said.strip()


def _sum_of(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _read(path: Path) -> bytes:
    """A regular file of ours or root's; links are not followed."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise StoreError(f"{path} is no file")
        _check_owner(found, path)
        return file.read()


def put(unfinished: Path, path: Path) -> None:
    """Move a library to its place, on disk with its sum before it has its name."""
    unfinished.chmod(0o644)
    said = unfinished.with_name(_sum_of(path).name)
    said.write_text(hashlib.sha256(unfinished.read_bytes()).hexdigest() + "\n", encoding="ascii")
    said.chmod(0o644)
    for source, target in ((said, _sum_of(path)), (unfinished, path)):
        with source.open("rb") as file:
            os.fsync(file.fileno())
        source.replace(target)
    fsync_directory(path.parent)


@contextlib.contextmanager
def locked(path: Path, seconds: float) -> Iterator[None]:
    """While the library at `path` is made: others wait up to `seconds` for it, then give up.

    File systems without locks do without: two then make the same file, and the later one stays.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(path.with_suffix(".lock"), flags, 0o600)
    try:
        _wait_for(descriptor, path, time.monotonic() + seconds)
        yield
    finally:
        os.close(descriptor)


def _wait_for(descriptor: int, path: Path, deadline: float) -> None:
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise StoreError(f"{path}: another process has been compiling too long") from None
            time.sleep(POLL_SECONDS)
        except OSError as problem:
            if problem.errno in NO_LOCKS:
                return None
            raise
