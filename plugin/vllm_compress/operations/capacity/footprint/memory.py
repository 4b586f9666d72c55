"""What fits where: weights, KV cache and overhead on each device, under vLLM's own rules.

Splits. Tensor parallelism cuts heads, so it must divide their number; key-value heads are cut too
or, where there are fewer than ranks, copied; column cuts must fall on a format's groups; the
vocabulary is padded to a multiple of 64. Pipeline stages take whole layers, the spare ones going to
the stages before the last. As vLLM 0.32 does all of it, so does this.

KV cache. vLLM keeps pages of `block` tokens. Layers that look back equally far form groups, all of
the size of the smallest (or of the largest, if less than half as large again), padded, and a page
holds one block of one group. A layer with a window of w tokens keeps no more than
w - 1 + (tokens of one step), one with chunks of w no more than w + (tokens of one step). Latent
(MLA) caches are copied to every rank. A state (Mamba, linear attention) takes a page, however long
the sequence is, and a second one, with which prefixes are cached; where it is larger than a page,
pages get more tokens. A draft's layers have their pages in the same pool: as it is a version of the
model, a block of the one comes with a block of the other.

The overheads are estimates: CUDA context, communication buffers, graphs, activations of the largest
step. They are a few percent of an 80 GB device. What vLLM prints at start is the truth.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil

from compress_methods.checkpoint.sharding import VOCABULARY, check_matrix
from compress_methods.errors import FormatError
from compress_methods.model.architecture import GENERIC
from vllm_compress.operations.capacity.footprint.shapes import Matrix, ModelShape
from vllm_compress.operations.capacity.footprint.storage import UNKNOWN, Part, Scheme
from vllm_compress.operations.capacity.hardware import Hardware

UTILIZATION = 0.92
PADDING = 64
REPLICATED = frozenset(("q_a_proj", "kv_a_proj_with_mqa"))
KEY_VALUE = frozenset(("k_proj", "v_proj"))
MORE_LAYERS = 1.5
BLOCK = {"gpu": 16, "cpu": 128}
LATENT_BLOCK, STATE_PAGES = 128, 2

DRIVER_BYTES = 500 * 2**20
CONTEXT_BYTES = 700 * 2**20
GRAPH_BYTES = 800 * 2**20
COMMUNICATION_BYTES = 600 * 2**20
CPU_PROCESS_BYTES = 1200 * 2**20
LOGIT_BYTES = 10


@dataclass(frozen=True)
class Layout:
    """Devices of one replica: `tp` tensor-parallel ranks in each of `pp` pipeline stages."""

    tp: int = 1
    pp: int = 1

    @property
    def devices(self) -> int:
        return self.tp * self.pp

    def __str__(self) -> str:
        stages = f", pp {self.pp}" if self.pp > 1 else ""
        return f"tp {self.tp}{stages}"


def stage_layers(layers: int, stages: int) -> list[int]:
    """Layers of each pipeline stage."""
    sizes = [layers // stages] * stages
    for i in range(layers % stages):
        sizes[-2 - i] += 1
    return sizes


def refusal(scheme: Scheme, layout: Layout) -> str | None:
    """Say why vLLM would not start a model so split, or None."""
    shape, tp = scheme.shape, layout.tp
    if layout.pp > shape.layers:
        return f"{shape.layers} layers are fewer than {layout.pp} stages"
    if shape.heads % tp:
        return f"{shape.heads} attention heads are not divisible by {tp}"
    if not shape.latent and shape.kv_heads % tp and tp % shape.kv_heads:
        return f"{shape.kv_heads} key-value heads are neither divisible by {tp} nor a divisor of it"
    if shape.state is not None and shape.state.heads % tp:
        return f"{shape.state.heads} heads of states are not divisible by {tp}"
    for part in scheme.parts:
        reason = _uncuttable(shape, part, tp) or _unshareable(shape, part, layout.pp)
        if reason is not None:
            return reason
    if scheme.draft is not None:
        if layout.pp > 1:
            return "a draft on several pipeline stages is not planned"
        reason = refusal(scheme.draft, layout)
        return None if reason is None else f"draft: {reason}"
    return None


def _unshareable(shape: ModelShape, part: Part, stages: int) -> str | None:
    """Say why so many pipeline stages cannot share a part's matrices, or None."""
    if not part.shared or stages == 1:
        return None
    stage = [s for s, count in enumerate(stage_layers(shape.layers, stages)) for _ in range(count)]
    for layer, owner in part.shared.items():
        if owner == UNKNOWN:
            return "layers that share weights cannot be on several pipeline stages"
        if stage[layer] != stage[owner]:
            return f"layers {owner} and {layer} share weights, but are on different pipeline stages"
    return None


def _uncuttable(shape: ModelShape, part: Part, tp: int) -> str | None:
    """Say why `tp` ranks cannot share a matrix, or None; what ranks copy is never cut."""
    matrix = part.matrix
    leaf = matrix.module.rpartition(".")[2]
    copied = leaf in KEY_VALUE and not shape.latent and shape.kv_heads < tp
    if not matrix.kind or leaf in REPLICATED or copied:
        return None
    if matrix.kind in VOCABULARY:
        padded = ceil(matrix.rows / PADDING) * PADDING
        return (
            f"the padded vocabulary of {padded} is not divisible by {tp}" if padded % tp else None
        )
    if part.format is None:
        size = matrix.cols if leaf in GENERIC.row_parallel else matrix.rows
        return f"{matrix.module}: {size} is not divisible by {tp}" if size % tp else None
    try:
        check_matrix(matrix.module, matrix.kind, (matrix.rows, matrix.cols), part.format, tp)
    except FormatError as problem:
        return str(problem)
    return None


def rank_shape(shape: ModelShape, matrix: Matrix, tp: int) -> tuple[int, int]:
    """[rows, cols] of a matrix that one of `tp` ranks holds."""
    rows, cols, leaf = matrix.rows, matrix.cols, matrix.module.rpartition(".")[2]
    if tp == 1 or leaf in REPLICATED:
        return rows, cols
    if matrix.kind in VOCABULARY:
        return ceil(rows / PADDING) * PADDING // tp, cols
    if not matrix.kind:
        # Outside the blocks (image encoders) linear layers are cut too; norms and routers are not.
        cut = not matrix.layers and cols > 1 and rows % tp == 0
        return (rows // tp, cols) if cut else (rows, cols)
    if leaf in GENERIC.row_parallel:
        return rows, cols // tp
    if leaf in KEY_VALUE and not shape.latent and shape.kv_heads < tp:
        return rows // shape.kv_heads, cols
    return rows // tp, cols


def part_bytes(shape: ModelShape, part: Part, tp: int) -> int:
    """Bytes of a part in one layer on one rank; outside the blocks, of all of it."""
    matrix = part.matrix
    size = (matrix.rows, matrix.cols) if part.copied else rank_shape(shape, matrix, tp)
    return part.bytes_of(*size) * matrix.count


def stage_weights(scheme: Scheme, layout: Layout) -> list[int]:
    """Bytes of weights on a rank of each stage: embedding first, output head last."""
    shape, tp = scheme.shape, layout.tp
    by_layer: dict[int, int] = defaultdict(int)
    first = last = 0
    for part in scheme.parts:
        size = part_bytes(shape, part, tp)
        for layer in part.matrix.layers:
            by_layer[layer] += 0 if layer in part.shared else size
        if not part.matrix.layers:
            head = part.matrix.kind == "lm_head"
            first += 0 if head else size
            shared = part.matrix.kind == "embedding" and shape.tied and layout.pp > 1
            last += size if head or shared else 0
    out, start = [], 0
    for count in stage_layers(shape.layers, layout.pp):
        out.append(sum(by_layer[i] for i in range(start, start + count)))
        start += count
    out[0] += first
    out[-1] += last
    return out


@dataclass(frozen=True)
class Cache:
    """Pages of the KV cache on one rank. `groups`: how many, their window, whether in chunks;
    `states`: pages that every request holds."""

    block: int
    page_bytes: int
    groups: tuple[tuple[int, int | None, bool], ...]
    in_flight: int
    states: int = 0

    def blocks(self, length: int) -> int:
        """Pages that a request of `length` tokens holds at most."""
        total = self.states
        for count, window, chunked in self.groups:
            kept, extra = length, 0
            if window is not None:
                kept = min(length, window + self.in_flight - (0 if chunked else 1))
                extra = 0 if chunked else 1
            total += count * (ceil(kept / self.block) + extra)
        return total

    @cached_property
    def windowed(self) -> bool:
        return any(window is not None for _, window, _ in self.groups)


def cache_of(
    shape: ModelShape, layout: Layout, kind: str, value_bytes: int, in_flight: int
) -> Cache:
    """The KV cache of a model; `value_bytes` is 2, or 1 for fp8."""
    kinds, state = shape.attention, shape.state
    sizes = [a.layers for a in kinds] + ([] if state is None else [state.layers])
    size = min(sizes)
    if max(sizes) < MORE_LAYERS * size:
        size = max(sizes)
    groups = tuple((ceil(a.layers / size), a.window, a.chunked) for a in kinds)
    stage = max(stage_layers(shape.layers, layout.pp))
    mine = ceil(size * stage / shape.layers)
    block = BLOCK[kind]
    token = rank_kv_values(shape, layout.tp) * value_bytes
    if state is None:
        return Cache(block, block * mine * token, groups, in_flight)
    least = max(block, LATENT_BLOCK) if shape.latent else block
    held = state.rank_bytes(layout.tp, kind == "cpu")
    block = least * max(1, ceil(held / (least * token)))
    states = STATE_PAGES * ceil(state.layers / size)
    return Cache(block, block * mine * token, groups, in_flight, states)


def rank_kv_values(shape: ModelShape, tp: int) -> int:
    """Values that one layer keeps of one token on one rank."""
    if shape.latent:
        return shape.latent
    return max(1, shape.kv_heads // tp) * (shape.head_dim + shape.value_dim)


@dataclass(frozen=True)
class Fit:
    """One replica's memory on its fullest device, bytes; `reason` says why it cannot be."""

    layout: Layout
    weights: int = 0
    overhead: int = 0
    usable: int = 0
    cache: Cache | None = None
    pool: int = 0
    reason: str | None = None

    @property
    def kv_bytes(self) -> int:
        return self.pool * self.cache.page_bytes if self.cache else 0

    def requests(self, length: int) -> int:
        """Count the requests of `length` tokens that the KV cache holds at once."""
        return self.pool // self.cache.blocks(length) if self.cache else 0


def overhead_bytes(shape: ModelShape, machine: Hardware, layout: Layout) -> int:
    """Estimate of all that is neither weights nor KV cache, on one device."""
    tokens, sequences = machine.max_tokens, machine.max_sequences
    widest = shape.widest * max(1, shape.experts_per_token) / layout.tp
    activations = round(2 * tokens * (4 * shape.hidden + 2 * widest))
    activations += sequences * shape.vocabulary * LOGIT_BYTES
    if machine.kind == "cpu":
        return CPU_PROCESS_BYTES + activations
    shared = COMMUNICATION_BYTES if layout.devices > 1 else 0
    return CONTEXT_BYTES + GRAPH_BYTES + shared + activations


def fit(
    scheme: Scheme, machine: Hardware, layout: Layout, context: int, kv_value_bytes: int = 2
) -> Fit:
    """Memory of one replica that must serve requests of up to `context` tokens."""
    reason = refusal(scheme, layout)
    if reason is not None:
        return Fit(layout, reason=reason)
    shape = scheme.shape
    weights = max(stage_weights(scheme, layout))
    overhead = overhead_bytes(shape, machine, layout)
    reserved = DRIVER_BYTES if machine.kind == "gpu" else 0
    usable = int(UTILIZATION * (machine.memory_bytes - reserved))
    cache = cache_of(shape, layout, machine.kind, kv_value_bytes, machine.max_tokens)
    if scheme.draft is not None:
        weights += max(stage_weights(scheme.draft, layout))
        its = cache_of(scheme.draft.shape, layout, machine.kind, kv_value_bytes, machine.max_tokens)
        cache = replace(cache, page_bytes=cache.page_bytes + its.page_bytes)
    free = usable - weights - overhead
    if free <= 0:
        reason = (
            f"{gb(weights)} of weights and {gb(overhead)} of overhead per device, "
            f"{gb(usable)} usable of {gb(machine.memory_bytes)}"
        )
        return Fit(layout, weights, overhead, usable, cache, 0, reason)
    pool = free // cache.page_bytes - 1
    needed = cache.blocks(context)
    if pool < needed:
        reason = (
            f"{gb(free)} left for the KV cache, one request of {context:,} tokens "
            f"needs {gb(needed * cache.page_bytes)}"
        )
    return Fit(layout, weights, overhead, usable, cache, max(0, pool), reason)


def gb(size: float) -> str:
    """`12.3 GB`, decimal as data sheets have it."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"
