"""One process at a time in a directory; the kernel frees it when the process ends.

The directory itself is locked. NFS locks only files that are open for writing, so there a file in
the directory, `.lock`, stands for it and goes when the lock does.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from pathlib import Path

LOCK_FILE = ".lock"
UNSUPPORTED = {errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
"""What file systems say that do not lock what they were asked to."""


class DirectoryLock:
    """Taken when made; `BlockingIOError` where another process has it, `OSError` naming the
    directory where its file system has no locks at all."""

    def __init__(self, directory: Path) -> None:
        self._file: Path | None = None
        self._descriptor = os.open(directory, os.O_RDONLY)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as problem:
            os.close(self._descriptor)
            if problem.errno not in UNSUPPORTED:
                raise
            self._file = directory / LOCK_FILE
            self._descriptor = _lock_file(self._file)

    def close(self) -> None:
        """Let others in."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)
        os.close(self._descriptor)


def _lock_file(path: Path) -> int:
    """A descriptor of a locked file that is there under `path`."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Who had the lock may have deleted this file between our opening and our locking it.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    return descriptor
        except OSError as problem:
            os.close(descriptor)
            if problem.errno in UNSUPPORTED:
                reason = "its file system cannot lock files, so two conversions could mix in it"
                raise OSError(problem.errno, reason, str(path.parent)) from problem
            raise
        os.close(descriptor)
