"""Which rows and columns of a matrix a vLLM layer holds on this rank.

A layer is one or more segments, each a matrix of its own in Hugging Face's model (q, k, v; gate,
up) or a range of rows in a matrix that is stored fused (Phi-3). Tensor parallelism cuts every
segment by rows, or all of them by columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)

from compress_methods.errors import CheckpointError

ShardId = str | int | tuple[int, ...] | None


@dataclass(frozen=True)
class Segment:
    """Rows of the whole matrix, and which of them this rank takes: `size` from `start`."""

    id: ShardId
    rows: int
    start: int
    size: int


@dataclass(frozen=True)
class Geometry:
    """Segments in order of their outputs, and the columns this rank takes of all of them."""

    segments: tuple[Segment, ...]
    cols: int
    col_range: tuple[int, int]

    def covered(self, shard: ShardId) -> range:
        """Indices of the segments that a loaded tensor with this shard id holds."""
        if shard is None:
            return range(len(self.segments))
        ids = [segment.id for segment in self.segments]
        if isinstance(shard, tuple):
            return range(ids.index(shard[0]), ids.index(shard[-1]) + 1)
        return range(ids.index(shard), ids.index(shard) + 1)

    def row_ranges(self, indices: range) -> list[tuple[int, int]]:
        """This rank's rows in a stored matrix made of those segments, neighbours joined."""
        out: list[tuple[int, int]] = []
        offset = 0
        for segment in (self.segments[i] for i in indices):
            start = offset + segment.start
            if out and out[-1][1] == start:
                out[-1] = (out[-1][0], start + segment.size)
            else:
                out.append((start, start + segment.size))
            offset += segment.rows
        return out


def linear_geometry(layer: Any) -> Geometry:
    """Geometry of any of vLLM's linear layers."""
    rank, size = layer.tp_rank, layer.tp_size
    whole = (0, layer.input_size)
    if isinstance(layer, QKVParallelLinear):
        return Geometry(_qkv(layer), layer.input_size, whole)
    if isinstance(layer, MergedColumnParallelLinear):
        segments = tuple(_even(i, n, rank, size) for i, n in enumerate(layer.output_sizes))
        return Geometry(segments, layer.input_size, whole)
    if isinstance(layer, ColumnParallelLinear):
        return Geometry((_even(None, layer.output_size, rank, size),), layer.input_size, whole)
    if isinstance(layer, RowParallelLinear):
        width = layer.input_size // size
        columns = (rank * width, (rank + 1) * width)
        return Geometry((_even(None, layer.output_size, 0, 1),), layer.input_size, columns)
    sizes = getattr(layer, "output_sizes", [layer.output_size])
    ids: list[ShardId] = [None] if len(sizes) == 1 else list(range(len(sizes)))
    segments = tuple(_even(i, n, 0, 1) for i, n in zip(ids, sizes, strict=True))
    return Geometry(segments, layer.input_size, whole)


def _even(shard: ShardId, rows: int, rank: int, size: int) -> Segment:
    return Segment(shard, rows, rank * (rows // size), rows // size)


def _qkv(layer: Any) -> tuple[Segment, ...]:
    """Ranks that outnumber the key-value heads hold copies of them."""
    if len(layer.output_sizes) != 3:
        raise CheckpointError(f"{layer.prefix}: {type(layer).__name__} is not served compressed")
    kv_rank = layer.tp_rank // layer.num_kv_head_replicas
    out = []
    for shard, heads, mine, rank, width in (
        ("q", layer.total_num_heads, layer.num_heads, layer.tp_rank, layer.head_size),
        ("k", layer.total_num_kv_heads, layer.num_kv_heads, kv_rank, layer.head_size),
        ("v", layer.total_num_kv_heads, layer.num_kv_heads, kv_rank, layer.v_head_size),
    ):
        out.append(Segment(shard, heads * width, rank * mine * width, mine * width))
    return tuple(out)
