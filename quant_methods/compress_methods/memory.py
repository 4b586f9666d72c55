"""Whether a model fits in main memory, and in which dtype, before it is loaded.

Sizes come from file headers. Available memory is what the kernel calls MemAvailable, less where a
container's limit (cgroup v2) leaves less; on systems that tell neither, nothing is refused.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import resource
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch

from compress_methods.compressed import open_compressed, read_entries, read_json
from compress_methods.errors import CalibrationError, CheckpointError
from compress_methods.progress import size_text
from compress_methods.quantization_config import QUANT_METHOD

MEMINFO = Path("/proc/meminfo")
STATUS = Path("/proc/self/status")
CGROUP = Path("/sys/fs/cgroup")
M_MMAP_THRESHOLD = -3


def available_bytes() -> int | None:
    """Bytes a process could still take without swapping; None where the system does not say."""
    found = []
    try:
        lines = MEMINFO.read_text().splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    except OSError:
        pass
    try:
        limit = int((CGROUP / "memory.max").read_text())
        found.append(limit - int((CGROUP / "memory.current").read_text()))
    except (OSError, ValueError):
        pass
    return min(found, default=None)


def peak_bytes() -> int:
    """Most memory this process has had resident.

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
    of a conversion: tensors come and go in sizes that do not fit each other's gaps.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20)


def parameters(directory: Path) -> Counter[torch.dtype]:
    """How many values of each dtype a checkpoint has once loaded; raises `CheckpointError`.

    A compressed matrix counts as bfloat16, which it is unpacked to at the least.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory")
    block = read_json(directory / "config.json").get("quantization_config") or {}
    counts: Counter[torch.dtype] = Counter()
    if block.get("quant_method") == QUANT_METHOD:
        checkpoint = open_compressed(directory)
        entries = checkpoint.dense
        counts[torch.bfloat16] += sum(m.rows * m.cols for m in checkpoint.matrices.values())
    else:
        entries = read_entries(directory)
    for entry in entries.values():
        counts[entry.dtype] += math.prod(entry.shape)
    return counts


def loading_dtype(directories: Iterable[Path], advice: str) -> torch.dtype:
    """float32 where the models fit twice over in it, else the first one's own dtype.

    Raises `CalibrationError`, ending in `advice`, where they do not fit at all.
    """
    paths = list(directories)
    counts = [parameters(path) for path in paths]
    values = sum(count.total() for count in counts)
    own = _own_dtype(counts[0])
    free = available_bytes()
    if free is None or 2 * 4 * values <= free:
        return torch.float32
    if own.itemsize * values > 0.9 * free:
        names = " and ".join(path.name for path in paths)
        raise CalibrationError(
            f"{names}: {size_text(own.itemsize * values)} of weights do not fit "
            f"{size_text(free)} of free memory; {advice}"
        )
    return own


def _own_dtype(count: Counter[torch.dtype]) -> torch.dtype:
    """The float dtype of two bytes or more that most values have; bfloat16 where none has."""
    usual = [d for d, _ in count.most_common() if d.is_floating_point and d.itemsize > 1]
    return usual[0] if usual else torch.bfloat16
