"""Seconds that one step of vLLM takes: a roofline, or what was measured.

A step runs the decoder blocks on all its tokens (one for each decoding request, more for prompts),
the output head on those tokens that are sampled, and attention over what is cached:

    step = overhead + max(weights read / bandwidth, operations / compute)   blocks, on n tokens
                    + max(head read / bandwidth, operations / compute)      head, on s samples
                    + cached bytes read / bandwidth                         decoding
                    + operations on (query, key) pairs / compute            prompts
                    + all-reduces of tensor parallelism

Of k among E experts, n tokens read a share 1 - (1 - k/E)^n. Peaks are those of the hardware table
times an efficiency; without calibration that is an assumption, of GPUs by kernel (`kernels.py`), of
CPUs in EFFICIENCY, and results are good for comparing options rather than for promises. A pipeline
of p stages works on p batches at once, so each of them sees the time of the whole model.

`MeasuredStep` is the same with a curve over tokens that was measured on a server (`calibration`).
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, replace
from typing import Protocol

from compress_methods.formats import Format
from compress_methods.formats.floats import Float
from compress_methods.formats.integer import Integer
from compress_methods.formats.lookup import Lookup
from compress_methods.formats.sparse import Sparse
from compress_methods.formats.trellis import Trellis
from vllm_compress.handed import handed_kind
from vllm_compress.operations.capacity.footprint.memory import (
    Layout,
    part_bytes,
    rank_kv_values,
    rank_shape,
)
from vllm_compress.operations.capacity.footprint.shapes import ModelShape
from vllm_compress.operations.capacity.footprint.storage import Scheme
from vllm_compress.operations.capacity.hardware import Hardware
from vllm_compress.operations.capacity.throughput.kernels import (
    Shares,
    Use,
    kernel_of,
    multiplied,
)

REDUCE_SECONDS = {True: 12e-6, False: 30e-6}
NVLINK = 100e9


@dataclass(frozen=True)
class Efficiency:
    """Shares of the peaks that are reached, and seconds each step, sequence and request add."""

    bandwidth: float
    compute: float
    step: float
    sequence: float
    request: float


EFFICIENCY = {
    "gpu": Efficiency(0.8, 0.5, 1.5e-3, 1e-5, 5e-3),
    "cpu": Efficiency(0.5, 0.3, 4e-3, 3e-4, 1e-2),
}


class Step(Protocol):
    """What the simulation asks of a deployment."""

    @property
    def request_seconds(self) -> float:
        """Spent on a request outside the engine's steps."""

    def effective(self, length: float) -> float:
        """Tokens that a query attends to after `length`, averaged over layers with windows."""

    def seconds(self, tokens: int, sampled: int, context: float, pairs: float) -> float:
        """One step: tokens in it, those sampled, cached tokens that decoding requests read, and
        (query, key) pairs of prompts."""


@dataclass(frozen=True)
class Windows:
    """How far back layers look: (layers, window)."""

    layers: tuple[tuple[int, int | None], ...]

    def effective(self, length: float) -> float:
        if all(window is None for _, window in self.layers):
            return length
        total = sum(n for n, _ in self.layers)
        seen = sum(n * (length if w is None else min(length, w)) for n, w in self.layers)
        return seen / total


def windows_of(shape: ModelShape) -> Windows:
    """Return a model's windows; a chunk counts as one, at most twice what a token sees."""
    return Windows(tuple((a.layers, a.window) for a in shape.attention))


@dataclass(frozen=True)
class Roofline:
    """All sums of one rank, at the peaks: bytes, and seconds of arithmetic per token. What a kernel
    reads more slowly than others counts as more bytes, and so does its arithmetic."""

    windows: Windows
    bandwidth: float
    body_bytes: float
    expert_bytes: float
    expert_share: float
    token_seconds: float
    head_bytes: float
    head_seconds: float
    kv_bytes: float
    state_bytes: float
    pair_seconds: float
    reduce_seconds: float
    reduce_token_seconds: float
    efficiency: Efficiency

    @property
    def request_seconds(self) -> float:
        return self.efficiency.request

    def effective(self, length: float) -> float:
        return self.windows.effective(length)

    def body_seconds(self, tokens: int) -> float:
        """The decoder blocks without attention."""
        if not tokens:
            return 0.0
        touched = 1 - (1 - self.expert_share) ** tokens if self.expert_bytes else 0.0
        read = (self.body_bytes + self.expert_bytes * touched) / self.bandwidth
        work = tokens * self.token_seconds
        communication = self.reduce_seconds + tokens * self.reduce_token_seconds
        e = self.efficiency
        return max(read / e.bandwidth, work / e.compute) + communication

    def head_time(self, sampled: int) -> float:
        e = self.efficiency
        read, work = self.head_bytes / self.bandwidth, sampled * self.head_seconds
        return max(read / e.bandwidth, work / e.compute) if sampled else 0.0

    def seconds(self, tokens: int, sampled: int, context: float, pairs: float) -> float:
        e = self.efficiency
        kept = context * self.kv_bytes + sampled * 2 * self.state_bytes  # read and written
        attention = kept / self.bandwidth / e.bandwidth
        attention += pairs * self.pair_seconds / e.compute
        fixed = e.step + sampled * e.sequence
        return fixed + self.body_seconds(tokens) + self.head_time(sampled) + attention


def roofline(
    scheme: Scheme,
    machine: Hardware,
    layout: Layout,
    kv_value_bytes: int = 2,
    efficiency: Efficiency | None = None,
) -> Roofline:
    """Sum up a scheme on devices of a kind."""
    shape, tp = scheme.shape, layout.tp
    e = efficiency or EFFICIENCY[machine.kind]
    body = experts = token = head = head_time = 0.0
    share = shape.experts_per_token / shape.experts if shape.experts else 0.0
    for part in scheme.parts:
        matrix = part.matrix
        is_head = matrix.kind == "lm_head" or (matrix.kind == "embedding" and shape.tied)
        layers = len(matrix.layers)
        if not layers and not is_head:
            continue
        rows, cols = rank_shape(shape, matrix, tp)
        use = kernel_of(part.format, machine) if machine.kind == "gpu" else None
        slower = Shares(1.0, 1.0, "") if use is None else _against(use.shares, e)
        rate = compute_rate(part.format, machine) * slower.compute
        work = 2.0 * rows * cols / rate if matrix.kind else 0.0
        size = part_bytes(shape, part, tp) / slower.bandwidth
        if is_head:
            head, head_time = head + size, head_time + work
        elif matrix.experts and matrix.kind:
            experts += size * layers
            token += work * layers * matrix.count * share
        else:
            body += size * layers
            token += work * layers * matrix.count
    reduces = 2 * shape.layers if tp > 1 else 0
    moved = 2.0 * (tp - 1) / tp * 2 * shape.hidden / machine.link_bytes_per_s
    values = rank_kv_values(shape, tp)
    heads, state, on_cpu = shape.heads / tp, shape.state, machine.kind == "cpu"
    return Roofline(
        windows=windows_of(shape),
        bandwidth=machine.bandwidth_bytes_per_s,
        body_bytes=body,
        expert_bytes=experts,
        expert_share=share,
        token_seconds=token,
        head_bytes=head,
        head_seconds=head_time,
        kv_bytes=shape.kv_layers * values * kv_value_bytes,
        state_bytes=0 if state is None else state.layers * state.rank_bytes(tp, on_cpu),
        pair_seconds=2.0
        * shape.kv_layers
        * heads
        * (shape.head_dim + shape.value_dim)
        / dense_rate(machine),
        reduce_seconds=reduces * REDUCE_SECONDS[machine.link_bytes_per_s > NVLINK],
        reduce_token_seconds=reduces * moved,
        efficiency=e,
    )


def _against(shares: Shares, efficiency: Efficiency) -> Shares:
    """Shares of what is reached where nothing is said of a kernel."""
    return replace(
        shares,
        bandwidth=shares.bandwidth / efficiency.bandwidth,
        compute=shares.compute / efficiency.compute,
    )


def dense_rate(machine: Hardware) -> float:
    """Operations per second on 16-bit weights."""
    return machine.rate("bf16", "fp16", "fp32")


def compute_rate(fmt: Format | None, machine: Hardware) -> float:
    """Operations per second on weights of a format (None: kept): that of the activations they meet.

    On CPUs 8-bit activations come with W8A8, and with our kernels for 4 bits and less.
    """
    if machine.kind == "gpu":
        use = kernel_of(fmt, machine)
        return dense_rate(machine) if use is None else machine.rate(*use.dtypes)
    inner = multiplied(fmt)
    values = inner.values if isinstance(inner, Sparse) else inner
    few = isinstance(values, Trellis) or (isinstance(values, Lookup) and not values.of_floats)
    few |= isinstance(values, Integer | Float) and values.bits <= 4
    eight = few or (isinstance(values, Integer) and values.activations == "int8")
    return machine.rate("int8", "bf16", "fp16", "fp32") if eight else dense_rate(machine)


def kernel_refusal(scheme: Scheme, machine: Hardware) -> str | None:
    """Say why a scheme is not planned on a machine: no GPU kernel reads it."""
    for part in scheme.parts if machine.kind == "gpu" else ():
        fmt, looked_up = part.format, part.matrix.kind == "embedding" and not scheme.shape.tied
        experts = part.matrix.experts and part.matrix.kind
        if experts and fmt is not None and handed_kind(fmt) is None:
            return f"experts in {fmt.describe()} are served on CPUs only"
        if fmt is not None and not looked_up and kernel_of(fmt, machine) is None:
            return (
                f"no GPU kernel for {fmt.describe()}: unpacked at every step, slower than the "
                "original"
            )
    return None


def kernels_used(scheme: Scheme, machine: Hardware) -> list[tuple[str, str, Use]]:
    """Kernels of a GPU: format, machine and kernel; nothing for CPUs."""
    formats = {part.format for part in scheme.parts if part.format and machine.kind == "gpu"}
    found = [(fmt.describe(), kernel_of(fmt, machine)) for fmt in formats]
    named = [(said, machine.key, use) for said, use in found if use is not None]
    return sorted(named, key=lambda each: each[0])


@dataclass(frozen=True)
class Curve:
    """Seconds over a count: straight lines between points, the last of them continued, never
    downwards. In between it may fall: more tokens can be a matter for a quicker kernel."""

    points: tuple[tuple[float, float], ...]

    def __call__(self, count: float) -> float:
        xs = [x for x, _ in self.points]
        i = bisect.bisect_left(xs, count)
        if i == 0 or len(xs) == 1:
            return self.points[0][1]
        i = min(i, len(xs) - 1)
        (x0, y0), (x1, y1) = self.points[i - 1], self.points[i]
        slope = (y1 - y0) / (x1 - x0)
        return y0 + slope * (count - x0) if count <= x1 else y1 + max(0.0, slope) * (count - x1)


@dataclass(frozen=True)
class MeasuredStep:
    """A step as measured: `curve` over tokens, `head` over samples beyond the first."""

    windows: Windows
    curve: Curve
    head: Curve
    per_context: float
    per_pair: float
    request_seconds: float

    def effective(self, length: float) -> float:
        return self.windows.effective(length)

    def seconds(self, tokens: int, sampled: int, context: float, pairs: float) -> float:
        head = self.head(sampled) if sampled > 1 else 0.0
        return self.curve(tokens) + head + context * self.per_context + pairs * self.per_pair


@dataclass(frozen=True)
class ScaledStep:
    """A roofline corrected by how far another one was from what was measured there."""

    model: Roofline
    reference: Roofline
    measured: MeasuredStep

    @property
    def request_seconds(self) -> float:
        return self.measured.request_seconds

    def effective(self, length: float) -> float:
        return self.model.effective(length)

    def seconds(self, tokens: int, sampled: int, context: float, pairs: float) -> float:
        found = self.measured.seconds(tokens, sampled, 0.0, 0.0)
        ratio = found / self.reference.seconds(tokens, sampled, 0.0, 0.0)
        return ratio * self.model.seconds(tokens, sampled, context, pairs)
