"""Memory for the KV cache on CPUs: chosen where nobody did, and held against what is free.

It has the keys and values of a draft beside the model's. By itself vLLM plans for 92% of the
machine's memory, and fails, late and at length, where other processes have some of it. Here half of
what the weights leave is taken, so that requests, loading and other processes have the rest. A
cache too small for one request of the longest context is refused before anything is loaded.

Fails where: `weights` are counted as the files hold them; `--dtype float32` doubles dense ones.
Layers with windows, and models whose shapes are not known, are left to vLLM to judge.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from compress_methods.checkpoint.compressed import read_json
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
GENERATES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
NODES = Path("/sys/devices/system/node")


@dataclass(frozen=True)
class Kept:
    """What a request keeps on each worker: bytes of a block of tokens, of `models` models."""

    block: int
    block_bytes: int
    context: int
    models: int = 1

    def tokens(self, size: int) -> int:
        """How many tokens so many bytes hold."""
        return size // self.block_bytes * self.block

    def require(self, size: int) -> None:
        """Refuse a KV cache too small for one request."""
        if self.tokens(size) < self.context:
            needed = -(-self.context // self.block) * self.block_bytes
            beside = " and its draft" if self.models > 1 else ""
            raise CompressError(
                f"a request of {self.context:,} tokens keeps {_gib(needed)} of the model{beside}, "
                f"the KV cache has {_gib(size)}; lower --max-model-len or raise {SPACE_VARIABLE}"
            )


def kept_by(models: Sequence[str], ways: int, value_bytes: int, context: int | None) -> Kept | None:
    """What a model, and its draft, keep of a request of `context` tokens, by default the longest;
    None where shapes do not say it."""
    from vllm_compress.operations.capacity.footprint.memory import Layout, cache_of
    from vllm_compress.operations.capacity.footprint.shapes import load_shape

    try:
        # Encoders keep nothing, of which the shape does not tell.
        names = read_json(Path(models[0]) / "config.json").get("architectures") or [""]
        if not str(names[0]).endswith(GENERATES):
            return None
        shapes = [load_shape(model) for model in models]
    except (CompressError, OSError):
        return None
    if any(not s.attention or any(a.window for a in s.attention) for s in shapes):
        return None
    pages = [cache_of(shape, Layout(ways), "cpu", value_bytes, 0) for shape in shapes]
    each = sum(page.page_bytes for page in pages)
    return Kept(pages[0].block, each, context or shapes[0].context, len(pages)) if each else None


def kv_cache_options(
    options: set[str], weights: int, workers: int, kept: Kept | None = None
) -> tuple[list[str], str]:
    """What to add to vLLM's options, and the line that says so; nothing where the user chose.

    `options` are the names of those given, `weights` the bytes of the model, 0 where unknown, which
    `workers` share. Raises `CompressError` where the weights do not fit, or not beside the KV cache
    that VLLM_CPU_KVCACHE_SPACE asks for, or that holds no request.
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
    if options & set(OPTIONS):
        return [], ""
    if chosen is not None:
        if kept is not None:
            kept.require(each)
        return [], ""
    size = int(left * SHARE) // workers // MIB * MIB
    holds = ""
    if kept is not None:
        kept.require(size)
        of = " of model and draft" if kept.models > 1 else ""
        holds = f" for {kept.tokens(size):,} tokens{of}"
    line = (
        f"KV cache: {_times(workers)}{_gib(size)}{holds}, half of what weights ({_gib(weights)}) "
        f"and vLLM leave of {_gib(free)} free; {SPACE_VARIABLE} (GiB) or --{BYTES_OPTION} chooses "
        "another"
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
