"""Collecting the tensors of a checkpoint that belong to a layer.

vLLM's loader hands tensors over one by one, each with the id of the shard it belongs to. They are
only collected (they are views of the mapped file, so this costs nothing) and then, once all are
there: completeness, shapes, and the slice of this rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from compress_methods.errors import CheckpointError, FormatError
from compress_methods.formats import MAIN_TENSOR, Stored, count_not_finite, torch_dtype
from vllm_compress.kernels.worker import prepare_worker
from vllm_compress.layers import row_order
from vllm_compress.layers.claims import Claims
from vllm_compress.layers.geometry import Geometry, ShardId
from vllm_compress.targets import Target

QKV = ("q", "k", "v")
DUMMY = "dummy"
PROCESSED = ("sharded_state", "runai_streamer_sharded", "tensorizer", "ipc_cache")
"""Load formats of parameters as a server prepares them."""
REUSED = ("fastsafetensors", "instanttensor", "runai_streamer", "modelexpress")
"""Load formats whose tensors may lie in a buffer that the next ones overwrite."""


class Collector:
    """Keeps what the loader brings: shard id, then tensor name."""

    def __init__(self, targets: Sequence[Target], claims: Claims | None = None) -> None:
        self.targets = targets
        self.claims = claims
        self.found: dict[ShardId, dict[str, Tensor]] = {}
        self.format = load_format()
        self.is_dummy = self.format == DUMMY
        self.is_done = False
        if self.format in PROCESSED:
            raise CheckpointError(
                f"--load-format {self.format} loads what a server has prepared before, which "
                "compressed weights are not saved as; leave it out"
            )

    @property
    def is_waiting(self) -> bool:
        """Whether there is something to prepare: the first time, or after a reload."""
        return not self.is_done or bool(self.found)

    def close(self) -> None:
        """Let go of what was collected, once it is prepared."""
        self.found, self.is_done = {}, True

    def attach(self, layer: Module) -> None:
        """Register an empty parameter for each stored tensor, whose loader keeps the tensor."""
        prepare_worker()
        target = self.targets[0]
        for name, spec in target.format.tensors(*target.shape).items():
            empty = Parameter(torch.empty(0, dtype=torch_dtype(spec.dtype)), requires_grad=False)
            head = getattr(layer, "head_size", 0)
            empty.weight_loader = self._loader(name, head)  # type: ignore[attr-defined]
            # vLLM's reload counts values until a layer has all, which the empty one does not tell.
            empty.weight_loader_numel = self._values(name)  # type: ignore[attr-defined]
            row_order.mark(empty, target.moved)
            layer.register_parameter(name, empty)

    def _values(self, name: str) -> int:
        """How many values the stored tensors of that name have."""
        specs = [target.format.tensors(*target.shape) for target in self.targets]
        return sum(math.prod(mine[name].shape) for mine in specs if name in mine)

    def _loader(self, name: str, head: int) -> Callable[..., None]:
        def load(param: Parameter, loaded: Tensor, shard: ShardId = None) -> None:
            if self.claims is not None:
                self.claims.check()
            # Of a layer that holds q, k and v the shard says whose rows these are.
            named = isinstance(shard, str) and len(self.targets) == len(QKV)
            moved = self.targets[QKV.index(str(shard)) if named else 0].moved
            if self.format in REUSED or not loaded.is_cpu:
                loaded = loaded.clone()
            self.found.setdefault(shard, {})[name] = row_order.finish(name, loaded, moved, head)
            _count(loaded.numel())

        return load

    def matrices(self, geometry: Geometry) -> list[tuple[Target, range, dict[str, Tensor]]]:
        """(target, segments it holds, stored tensors) in order of the outputs."""
        out = []
        for shard, tensors in self.dummy(geometry).items():
            covered = geometry.covered(shard)
            target = self.targets[0]
            if len(self.targets) == len(geometry.segments):
                target = self.targets[covered[0]]
            out.append((target, covered, tensors))
        out.sort(key=lambda part: part[1][0])
        held = [i for _, covered, _ in out for i in covered]
        for index in range(len(geometry.segments)):
            if held.count(index) != 1:
                target = self.targets[min(index, len(self.targets) - 1)]
                what = "is missing" if index not in held else "was loaded twice"
                raise CheckpointError(f"{target.module}.{MAIN_TENSOR} {what}")
        return out

    def dummy(self, geometry: Geometry | None = None) -> dict[ShardId, dict[str, Tensor]]:
        """Under `--load-format dummy` nothing is brought; matrices of zeros take its place."""
        if self.found or not self.is_dummy:
            return self.found
        ids: list[ShardId] = [None]
        if geometry is not None and len(self.targets) == len(geometry.segments):
            ids = [segment.id for segment in geometry.segments]
        return {shard: zeros(t) for shard, t in zip(ids, self.targets, strict=True)}


def load_format() -> str:
    """How vLLM brings the tensors, as `--load-format` says it."""
    from vllm.config import get_current_vllm_config_or_none

    config = get_current_vllm_config_or_none()
    return "" if config is None else str(config.load_config.load_format)


def is_dummy() -> bool:
    return load_format() == DUMMY


def _count(values: int) -> None:
    """Tell vLLM's reload, which counts what is copied, that so many values have come."""
    torch.empty(values, device="meta").copy_(torch.empty(values, device="meta"))


def zeros(target: Target) -> dict[str, Tensor]:
    """A matrix of zeros as its format stores one: the fewest rows it can, again and again."""
    fmt, (rows, cols) = target.format, target.shape
    unit = fmt.alignment(rows, cols)[0]
    specs = fmt.tensors(rows, cols)
    if not all(spec.rows_axis for spec in specs.values()):
        return fmt.pack(fmt.nearest(torch.zeros(rows, cols)))
    few = fmt.pack(fmt.nearest(torch.zeros(unit, cols)))
    out = {}
    for name, spec in specs.items():
        assert spec.rows_axis is not None
        axis = spec.rows_axis.axis
        repeated = torch.cat([few[name]] * -(-rows // unit), axis)
        out[name] = repeated.narrow(axis, 0, spec.shape[axis])
    return out


def check(target: Target, tensors: Mapping[str, Tensor]) -> None:
    """Names, shapes and dtypes of one matrix, as its format declares them; scales are finite."""
    for name, spec in target.format.tensors(*target.shape).items():
        if name not in tensors:
            raise CheckpointError(f"{target.module}.{name} is missing")
        found = tensors[name]
        if (tuple(found.shape), found.dtype) != (spec.shape, torch_dtype(spec.dtype)):
            raise CheckpointError(
                f"{target.module}.{name} is {list(found.shape)} {found.dtype}, expected "
                f"{list(spec.shape)} {spec.dtype}"
            )
        bad = count_not_finite(found)
        if bad:
            raise CheckpointError(
                f"{target.module}.{name} has {bad} values that are not finite (NaN or infinity)"
            )


def cut(
    target: Target,
    tensors: Mapping[str, Tensor],
    row_ranges: Sequence[tuple[int, int]],
    col_range: tuple[int, int],
) -> list[Stored]:
    """This rank's pieces of a stored matrix."""
    whole = Stored.whole(target.format, tensors, target.shape)
    return [whole.cut(rows, col_range) for rows in row_ranges]


def check_cuts(
    target: Target, row_ranges: Sequence[tuple[int, int]], col_range: tuple[int, int], ranks: int
) -> None:
    """Whether the format can be cut so; before anything is loaded."""
    rows, cols = target.shape
    try:
        row_unit, col_unit = target.format.alignment(rows, cols)
    except FormatError as problem:
        raise CheckpointError(f"{target.module}: {problem}") from None
    fmt = target.format
    cuts = [(edge, row_unit, rows, "rows") for edges in row_ranges for edge in edges]
    cuts += [(edge, col_unit, cols, "columns") for edge in col_range]
    helps = {"columns": True, "rows": fmt.inner is not fmt}
    for edge, unit, size, what in cuts:
        if edge % unit and edge != size:
            raise CheckpointError(
                f"{target.module}: {size} {what} in {fmt.describe()} cannot be divided "
                f"over {ranks} ranks at multiples of {unit}; use a smaller tensor-parallel size"
                + (f" or convert with a smaller {fmt.cut_by}" if helps[what] else "")
            )
