"""Memory for the KV cache on CPUs: chosen where nobody did, and held against what is free.

By itself vLLM plans for 92% of the machine's memory, and fails, late and at length, where other
processes have some of it. Here half of what the weights leave is taken, so that requests, loading
and other processes have the rest.

Fails where: `weights` are counted as the files hold them; `--dtype float32` doubles dense ones.
"""

from __future__ import annotations

import os
from pathlib import Path

from compress_methods.errors import CompressError
from compress_methods.system.memory import available_bytes

SPACE_VARIABLE = "VLLM_CPU_KVCACHE_SPACE"
BYTES_OPTION = "kv-cache-memory-bytes"
OPTIONS = (BYTES_OPTION, "gpu-memory-utilization", "num-gpu-blocks-override", "config")
"""Those that say it in another way; `config` is vLLM's own file, which may."""
GIB = 2**30
MIB = 2**20
PROCESSES = 2 * GIB
"""Of the server, its engine and a worker of a small model, measured at 1.7 GiB."""
SHARE = 0.5
LEAST = 64 * MIB
NODES = Path("/sys/devices/system/node")


def kv_cache_options(options: set[str], weights: int, workers: int) -> tuple[list[str], str]:
    """What to add to vLLM's options, and the line that says so; nothing where the user chose.

    `options` are the names of those given, `weights` the bytes of the model, 0 where unknown, which
    `workers` share. Raises `CompressError` where the weights do not fit, or not beside the KV cache
    that VLLM_CPU_KVCACHE_SPACE asks for.
    """
    free = free_bytes(workers)
    chosen = _chosen_space()
    each = 0 if chosen is None else chosen * GIB
    left = free - weights - PROCESSES
    if left < workers * max(each, LEAST):
        what = f"weights of {_gib(weights)} and {_gib(PROCESSES)} for vLLM itself"
        if each:
            what += f" and {_times(workers)}{_gib(each)} of KV cache ({SPACE_VARIABLE}={chosen})"
        raise CompressError(f"{_gib(free)} of memory are free, too little for {what}")
    if chosen is not None or options & set(OPTIONS):
        return [], ""
    size = int(left * SHARE) // workers // MIB * MIB
    line = (
        f"KV cache: {_times(workers)}{_gib(size)}, half of what weights ({_gib(weights)}) and vLLM "
        f"leave of {_gib(free)} free; {SPACE_VARIABLE} (GiB) or --{BYTES_OPTION} chooses another"
    )
    return [f"--{BYTES_OPTION}", str(size)], line


def _chosen_space() -> int | None:
    """What the variable says; vLLM reads it as a whole number of GiB."""
    said = os.environ.get(SPACE_VARIABLE)
    if not said:
        return None
    if not said.strip().isdigit():
        raise CompressError(f"{SPACE_VARIABLE} is {said!r}, expected a whole number of GiB")
    return int(said)


def free_bytes(workers: int) -> int:
    """Memory that so many workers may take: each stays on a node of its own, where there are
    several, and the fullest of these counts."""
    nodes = [free for path in sorted(NODES.glob("node[0-9]*")) if (free := _free_on(path))]
    if len(nodes) < 2:
        return available_bytes()
    used = nodes[: max(1, workers)]
    return min(available_bytes(), min(used) * max(1, workers))


def _free_on(node: Path) -> int:
    """What vLLM counts as free there; 0 on a node without memory."""
    counted = {"MemFree:", "Active(file):", "Inactive(file):", "SReclaimable:"}
    try:
        lines = [line.split() for line in (node / "meminfo").read_text().splitlines()]
    except OSError:
        return 0
    return sum(int(line[3]) * 1024 for line in lines if line[2:] and line[2] in counted)


def _times(workers: int) -> str:
    return f"{workers} x " if workers > 1 else ""


def _gib(size: int) -> str:
    return f"{size / GIB:,.1f} GiB"
