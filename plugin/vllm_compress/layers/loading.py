"""From the tensors of a checkpoint to those a kernel runs on.

vLLM's loader hands tensors over one by one, each with the id of the shard it belongs to. They are
only collected (they are views of the mapped file, so this costs nothing) and then, once all are
there: completeness, shapes, the slice of this rank, and one `prepare`. Parts of a fused layer are
joined before that if their format's tensors can be, which makes them one product; else each is
prepared and their outputs are joined.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from logging import getLogger
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from compress_methods.errors import CheckpointError, FormatError
from compress_methods.formats import Format, Prepared
from compress_methods.kernels import KERNELS
from vllm_compress.config import Target
from vllm_compress.layers.cpu import prepare_worker
from vllm_compress.layers.geometry import Geometry, ShardId
from vllm_compress.layers.ops import KERNEL_VARIABLE, Plan, forced_kernel

logger = getLogger("vllm.vllm_compress")
MAIN = "weight_packed"
Matrix = tuple[dict[str, Tensor], int]
"""Stored tensors and rows."""


class Collector:
    """Keeps what the loader brings: shard id, then tensor name."""

    def __init__(self, targets: Sequence[Target]) -> None:
        self.targets = targets
        self.found: dict[ShardId, dict[str, Tensor]] = {}
        self.is_dummy = _is_dummy()

    def attach(self, layer: Module) -> None:
        """Register an empty parameter for each stored tensor, whose loader keeps the tensor."""
        prepare_worker()
        target = self.targets[0]
        for name, spec in target.format.tensors(*target.shape).items():
            empty = Parameter(torch.empty(0, dtype=spec.dtype), requires_grad=False)
            empty.weight_loader = self._loader(name)  # type: ignore[attr-defined]
            layer.register_parameter(name, empty)

    def _loader(self, name: str) -> Callable[..., None]:
        def load(param: Parameter, loaded: Tensor, shard: ShardId = None) -> None:
            self.found.setdefault(shard, {})[name] = loaded

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
                raise CheckpointError(f"{target.module}.{MAIN} {what}")
        return out

    def dummy(self, geometry: Geometry | None = None) -> dict[ShardId, dict[str, Tensor]]:
        """Under `--load-format dummy` nothing is brought; matrices of zeros take its place."""
        if self.found or not self.is_dummy:
            return self.found
        ids: list[ShardId] = [None]
        if geometry is not None and len(self.targets) == len(geometry.segments):
            ids = [segment.id for segment in geometry.segments]
        return {shard: _zeros(t) for shard, t in zip(ids, self.targets, strict=True)}


def _is_dummy() -> bool:
    from vllm.config import get_current_vllm_config_or_none

    config = get_current_vllm_config_or_none()
    return config is not None and config.load_config.load_format == "dummy"


def _zeros(target: Target) -> dict[str, Tensor]:
    """A matrix of zeros as its format stores one: the fewest rows it can, again and again."""
    fmt, (rows, cols) = target.format, target.shape
    unit = fmt.units(rows, cols)[0]
    few = fmt.pack(fmt.nearest(torch.zeros(unit, cols)))
    out = {}
    for name, spec in fmt.tensors(rows, cols).items():
        axis = spec.rows_axis
        out[name] = few[name]
        if axis is not None:
            repeated = torch.cat([few[name]] * -(-rows // unit), axis.axis)
            out[name] = repeated.narrow(axis.axis, 0, spec.shape[axis.axis])
    return out


def check(target: Target, tensors: Mapping[str, Tensor]) -> None:
    """Names, shapes and dtypes of one matrix, as its format declares them."""
    for name, spec in target.format.tensors(*target.shape).items():
        if name not in tensors:
            raise CheckpointError(f"{target.module}.{name} is missing")
        found = tensors[name]
        if (tuple(found.shape), found.dtype) != (spec.shape, spec.dtype):
            raise CheckpointError(
                f"{target.module}.{name} is {list(found.shape)} {found.dtype}, expected "
                f"{list(spec.shape)} {spec.dtype}"
            )


def cut(
    target: Target,
    tensors: Mapping[str, Tensor],
    row_ranges: Sequence[tuple[int, int]],
    col_range: tuple[int, int],
) -> list[Matrix]:
    """This rank's pieces of a stored matrix."""
    rows, cols = target.shape
    out = []
    for start, end in row_ranges:
        piece = dict(tensors)
        if (start, end) != (0, rows):
            piece = target.format.slice(piece, target.shape, rows=(start, end))
        if col_range != (0, cols):
            piece = target.format.slice(piece, (end - start, cols), cols=col_range)
        out.append((piece, end - start))
    return out


def check_cuts(
    target: Target, row_ranges: Sequence[tuple[int, int]], col_range: tuple[int, int], ranks: int
) -> None:
    """Whether the format can be cut so; before anything is loaded."""
    rows, cols = target.shape
    try:
        row_unit, col_unit = target.format.units(rows, cols)
    except FormatError as problem:
        raise CheckpointError(f"{target.module}: {problem}") from None
    cuts = [(edge, row_unit, rows, "rows") for edges in row_ranges for edge in edges]
    cuts += [(edge, col_unit, cols, "columns") for edge in col_range]
    for edge, unit, size, what in cuts:
        if edge % unit and edge != size:
            raise CheckpointError(
                f"{target.module}: {size} {what} in {target.format.describe()} cannot be divided "
                f"over {ranks} ranks at multiples of {unit}; use a smaller tensor-parallel size"
                + (" or convert with a smaller group_size or m" if what == "columns" else "")
            )


def join(fmt: Format, pieces: Sequence[Matrix], cols: int) -> list[Matrix]:
    """One matrix out of several with the same columns, where the format's tensors allow it."""
    if len(pieces) < 2:
        return list(pieces)
    sizes = [rows for _, rows in pieces]
    unit = fmt.units(sizes[0], cols)[0]
    if any(rows % unit for rows in sizes[:-1]):
        return list(pieces)
    joined = {}
    for name, spec in fmt.tensors(sum(sizes), cols).items():
        tensors = [tensors[name] for tensors, _ in pieces]
        if spec.rows_axis is not None:
            joined[name] = torch.cat(tensors, spec.rows_axis.axis)
        elif all(torch.equal(tensors[0], other) for other in tensors[1:]):
            joined[name] = tensors[0]
        else:
            return list(pieces)
        if tuple(joined[name].shape) != spec.shape:
            return list(pieces)
    return [(joined, sum(sizes))]


def prepare(
    fmt: Format, pieces: Sequence[Matrix], cols: int, *, gather: bool = False, pad: int = 0
) -> tuple[Plan, list[Tensor]]:
    """Runtime tensors of the pieces, in the layout of the kernel for their device."""
    prepared = [_prepare(fmt, tensors, rows, cols, gather) for tensors, rows in pieces if rows]
    kernels = {matrix.kernel for matrix in prepared}
    if len(kernels) > 1:
        reference = KERNELS["reference"]
        prepared = [_with_kernel(reference, fmt, t, rows, cols) for t, rows in pieces if rows]
    kernel = prepared[0].kernel if prepared else "reference"
    device = pieces[0][0][MAIN].device
    if kernel == "reference" and forced_kernel() is None:
        _warn_slow(fmt.describe(), device.type)
    parts = tuple((matrix.rows, len(matrix.tensors)) for matrix in prepared)
    tensors = [tensor for matrix in prepared for tensor in matrix.tensors]
    return Plan(fmt, kernel, cols, parts, pad), tensors


def _prepare(
    fmt: Format, tensors: Mapping[str, Tensor], rows: int, cols: int, gather: bool
) -> Prepared:
    name = forced_kernel()
    if name is None or name == "vllm":
        return fmt.prepare(tensors, rows, cols, gather=gather)
    if name not in KERNELS:
        raise CheckpointError(
            f"{KERNEL_VARIABLE} is {name!r}, expected vllm or one of {', '.join(KERNELS)}"
        )
    kernel = KERNELS[name]
    if (gather and not kernel.gathers) or not kernel.supports(
        fmt, rows, cols, tensors[MAIN].device
    ):
        return fmt.prepare(tensors, rows, cols, gather=gather)
    return _with_kernel(kernel, fmt, tensors, rows, cols)


def _with_kernel(
    kernel: Any, fmt: Format, tensors: Mapping[str, Tensor], rows: int, cols: int
) -> Prepared:
    stored = [tensors[name] for name in fmt.tensors(rows, cols)]
    return Prepared(kernel.name, kernel.prepare(fmt, stored, rows, cols), rows, cols)


@lru_cache
def _warn_slow(kind: str, device: str) -> None:
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        logger.warning(
            "no fast kernel for %s on %s: it is unpacked at every use, in plain torch", kind, device
        )


def install(layer: Module, stored: Sequence[str], tensors: Sequence[Tensor]) -> list[str]:
    """Replace the placeholders by the runtime tensors; their parameter names in order."""
    for name in stored:
        delattr(layer, name)
    names = [MAIN if i == 0 else f"{MAIN}_{i}" for i in range(len(tensors))]
    for name, tensor in zip(names, tensors, strict=True):
        layer.register_parameter(name, Parameter(tensor, requires_grad=False))
    if not names:
        layer.register_parameter(MAIN, Parameter(torch.empty(0), requires_grad=False))
    return names
