"""Products on GPUs with formats that vLLM has no kernel for, in Triton (`triton/product.py`).

Takes integers, tables, small floats, trellises, and any of these or 16-bit values where n of every
m columns are stored. Matrices stay as they are stored but for scales, which become floats, and zero
points, which become bytes. Where Triton cannot be imported the reference does the work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from compress_methods.formats import MAIN_TENSOR, Format, Stored
from compress_methods.formats.dense import Dense
from compress_methods.formats.encoding.grouped import SCALES, Scaled
from compress_methods.formats.floats import Float
from compress_methods.formats.integer import ZEROS, Integer
from compress_methods.formats.lookup import TABLE, Lookup
from compress_methods.formats.sparse import MASK, Sparse
from compress_methods.formats.trellis import TILE, Trellis
from compress_methods.kernels.base import (
    Kernel,
    Operator,
    Prepared,
    Want,
    check_ids,
    register_kernel,
)

RANK = 200
GPUS = ("cuda", "xpu")
"""Devices by torch's names, AMD's among the first. Only NVIDIA's were ever run on."""
STEP, LEAST_STEP = 64, 16
"""Columns of a tile: at most, unless blocks of n:m have more, and at least."""
SPARSE_STEP = 32


class Values(NamedTuple):
    """How a format without a mask lies: a decoder of `triton/decoders.py` and its constants, its
    tensors, scales or None, columns that share one (0: all), columns that belong together."""

    decoder: str
    constants: tuple[int, ...]
    data: Sequence[Tensor]
    scales: Tensor | None
    group: int
    together: int


Reader = Callable[[Any, dict[str, Tensor], int], Values]


def _integer(fmt: Integer, tensors: dict[str, Tensor], rows: int) -> Values:
    data, middle = [tensors[MAIN_TENSOR]], -1
    if fmt.symmetric:
        middle = round(2 * fmt.middle)
    else:
        data.append(fmt.unpack_zeros(tensors[ZEROS], rows))
    constants = (fmt.bits, fmt.block, max(0, fmt.group_size), middle)
    return _scaled(fmt, "affine", constants, data, tensors[SCALES], fmt.block)


def _lookup(fmt: Lookup, tensors: dict[str, Tensor], rows: int) -> Values:
    codes = tensors[MAIN_TENSOR]
    known = tensors[TABLE] if fmt.learns_values else fmt.fixed_table(codes)
    constants = (fmt.bits, fmt.block, fmt.table_rows if fmt.learns_values else 0)
    return _scaled(fmt, "table", constants, [codes, known], tensors[SCALES], fmt.block)


def _float(fmt: Float, tensors: dict[str, Tensor], rows: int) -> Values:
    codes = tensors[MAIN_TENSOR].view(torch.uint8)
    each = torch.arange(2**fmt.bits, dtype=torch.int32, device=codes.device).to(torch.uint8)
    known = fmt.floats(each)
    solution = fmt.solution(tensors)
    scales = fmt.whole_scales(solution.scales, solution.of_rows, rows)
    # Of 4 bits they are powers of two, or have 4 significant bits: both are bfloat16 exactly.
    stored = scales.bfloat16() if fmt.bits == 4 else scales
    return _scaled(fmt, "table", (fmt.bits, fmt.block, 0), [codes, known], stored, fmt.block)


def _trellis(fmt: Trellis, tensors: dict[str, Tensor], rows: int) -> Values:
    constants = (fmt.bits, fmt.state_bits)
    return _scaled(fmt, "trellis", constants, [tensors[MAIN_TENSOR]], tensors[SCALES], TILE)


def _dense(fmt: Dense, tensors: dict[str, Tensor], rows: int) -> Values:
    return Values("plain", (), [tensors[MAIN_TENSOR]], None, 0, 1)


def _scaled(
    fmt: Scaled,
    decoder: str,
    constants: tuple[int, ...],
    data: Sequence[Tensor],
    scales: Tensor,
    block: int,
) -> Values:
    group = max(0, fmt.group_size)
    return Values(decoder, constants, data, scales, group, group or max(block, STEP))


READERS: dict[type[Format], Reader] = {
    Integer: _integer,
    Lookup: _lookup,
    Float: _float,
    Trellis: _trellis,
    Dense: _dense,
}


@cache
def product() -> Any:
    """The module that multiplies, where Triton can be imported."""
    try:
        from compress_methods.kernels.triton import product as in_triton
    except ImportError:
        return None
    return in_triton


@register_kernel
class TritonProduct(Kernel):
    """Tensors: the decoder's, then the mask and the scales, if any; facts say which."""

    name: ClassVar[str] = "triton"

    def rank(self, stored: Stored, want: Want) -> int | None:
        fmt = stored.format
        inner = fmt.values if isinstance(fmt, Sparse) else fmt
        known = type(inner) in READERS and (isinstance(fmt, Sparse) or not isinstance(fmt, Dense))
        there = stored.device.type in GPUS or self.wanted(want)
        return RANK if known and there and product() is not None else None

    def prepare(self, stored: Stored, want: Want) -> Prepared:
        fmt, (rows, cols) = stored.format, stored.size
        tensors = {name: t.contiguous() for name, t in stored.tensors.items()}
        mask, n, m, inner = None, 0, 0, fmt
        if isinstance(fmt, Sparse):
            fmt.mask(tensors)  # another count than n would be read beyond the row
            mask, n, m, inner = tensors[MASK], fmt.n, fmt.m, fmt.values
        values = READERS[type(inner)](inner, tensors, rows)
        step = max(SPARSE_STEP, m) if n else min(STEP, values.together)
        facts = {
            "decoder": values.decoder,
            "constants": values.constants,
            "n": n,
            "m": m,
            "group": values.group,
            "step": max(LEAST_STEP, step),
            "data": len(values.data),
        }
        own = [*values.data, *(t for t in (mask, values.scales) if t is not None)]
        owned = [t.clone(memory_format=torch.contiguous_format) for t in own]
        return Prepared(self.name, rows, cols, owned, fmt, facts=facts)

    def matmul(self, x: Tensor, prepared: Prepared, bias: Tensor | None) -> Tensor:
        assert prepared.format is not None
        inputs = prepared.format.quantize_activations(x)
        matrix = _matrix(prepared)
        few = len(x) <= product().FEW
        out: Tensor = matrix.few(inputs, bias) if few else matrix.many(inputs, bias)
        return out

    def corrected(self, prepared: Prepared) -> Operator | None:
        def function(
            x: Tensor, bias: Tensor | None, left: Tensor, right: Tensor, *tensors: Tensor
        ) -> Tensor:
            inner = x @ right.to(x.dtype).T
            matrix = _matrix(prepared.with_tensors(tensors))
            out: Tensor = matrix.few(x, bias, (left.to(x.dtype), inner))
            return out

        return Operator(function, ())

    def embed(self, ids: Tensor, prepared: Prepared) -> Tensor:
        check_ids(ids, prepared.rows)
        out: Tensor = _matrix(prepared).embed(ids, torch.float32)
        return out


def _matrix(prepared: Prepared) -> Any:
    """What `triton/product.py` multiplies with."""
    facts, made = prepared.facts, product()
    shared = facts["data"]
    rest = list(prepared.tensors[shared:])
    mask = rest.pop(0) if facts["n"] else None
    layout = made.Layout(
        facts["decoder"],
        tuple(facts["constants"]),
        *(facts[key] for key in ("n", "m", "group", "step")),
    )
    scales = rest.pop(0) if rest else None
    return made.Matrix(
        layout, prepared.rows, prepared.cols, prepared.tensors[:shared], mask, scales
    )
