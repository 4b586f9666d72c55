"""How much main memory there is to take, and how much this process took."""

from __future__ import annotations

import contextlib
import ctypes
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

STATUS = Path("/proc/self/status")
OWN_CGROUP = Path("/proc/self/cgroup")
CGROUPS = Path("/sys/fs/cgroup")
M_MMAP_THRESHOLD = -3


def available_bytes() -> int:
    """Bytes a process could still take without swapping.

    What the system calls available, less where a limit of this process's cgroup (version 2), as
    containers have one, leaves less.
    """
    return min([psutil.virtual_memory().available, *_left_in_cgroups()])


def _left_in_cgroups() -> Iterator[int]:
    """What the limit of each cgroup that this process is in leaves, from its own to the root.

    Files that were read and not again for a while count towards a limit, but make room before it is
    reached; so they are left out, as Kubernetes does.
    """
    try:
        lines = OWN_CGROUP.read_text().splitlines()
    except OSError:
        lines = []
    own = CGROUPS / next((line[4:] for line in lines if line.startswith("0::/")), "")
    for folder in (own, *own.parents):
        if not folder.is_relative_to(CGROUPS):
            return
        try:
            limit = int((folder / "memory.max").read_text())  # "max" where there is none
            used = int((folder / "memory.current").read_text())
        except (OSError, ValueError):
            continue
        unused = 0
        with contextlib.suppress(OSError):
            facts = map(str.split, (folder / "memory.stat").read_text().splitlines())
            unused = next((int(count) for name, count in facts if name == "inactive_file"), 0)
        yield max(0, limit - max(0, used - unused))


def peak_bytes() -> int:
    """Most memory this process has had resident; psutil knows no peak on Linux.

    Not `ru_maxrss` where that can be helped: it survives exec, so it starts with what the parent
    process had.
    """
    try:
        lines = STATUS.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return usage if sys.platform == "darwin" else usage * 1024


def return_large_blocks() -> None:
    """Have the C library (glibc) give tensors from 1 MiB back to the system as soon as they go.

    By default it keeps up to 32 MiB pieces in its heap, which then grows a little with every block
    of a conversion: tensors come and go in sizes that do not fit each other's gaps. It counts for
    the whole process, so only a program of ours calls it, never a library call in someone else's.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20)
