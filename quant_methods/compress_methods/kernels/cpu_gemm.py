"""Our own CPU product with integer weights of 2, 3, 4 and 8 bits, from any group size, and with
sparse ones of integers or 16-bit floats (`cpu_sparse`).

`cpu` quantizes activations to int8, one scale per token and 128 columns (or per token, where the
format asks for int8 activations). `cpu_exact` multiplies in float32, bfloat16 activations with AMX
in bfloat16, where products are exact and sums float32. Both look rows up, too. The table takes
`cpu` up to 4 bits, where it adds at most 3% to the divergence that the weights cause
(`python -m tests.benchmarks activations`), and for formats that ask for it; 8-bit weights lose so
little that it would treble their loss, so they get `cpu_exact`. Of sparse integers it takes all:
what leaving weights out costs is hundreds of times that.

Runtime layout: [weights uint8 [blocks, lines, bytes], scales [blocks, groups, together]], and zeros
uint8 like scales where stored. A line is 128 columns of as many rows as the library takes together
(16 with AVX-512, else one and no last dimension), in pieces of 128 codes packed as format `integer`
packs a block: with 16 rows a piece is 2 x 16 rows x 4 columns. Rows and columns are padded to whole
lines, where activations are 0. Row by row, 8-bit codes lose 128, to be signed.
Fails where no compiler is: the table then goes on to the next kernel.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from compress_methods.formats.dense import Dense
from compress_methods.formats.integer import Integer, pack_codes
from compress_methods.formats.sparse import Sparse
from compress_methods.kernels import cpu_sparse
from compress_methods.kernels.base import Kernel, Operator
from compress_methods.kernels.cpu.library import (
    DTYPES,
    LINE,
    Library,
    Mode,
    Packed,
    empty_bytes,
    library,
    side_by_side,
)

if TYPE_CHECKING:
    from compress_methods.formats.base import Format, Prepared

SIGNED_SHIFT = 0x80
BYTE = 8
MOST_BITS = 4
SLAB_ELEMENTS = 2**22


class CpuGemm(Kernel):
    """int8 activations."""

    name: ClassVar[str] = "cpu"
    gathers: ClassVar[bool] = True
    mode: ClassVar[Mode] = Mode.INT8_PER_LINE

    def supports(self, fmt: Format, rows: int, cols: int, device: torch.device) -> bool:
        if isinstance(fmt, Sparse):
            exact = isinstance(fmt.values, Dense)
            known = cpu_sparse.takes(fmt) and (not exact or self.mode == Mode.EXACT)
        else:
            known = isinstance(fmt, Integer)
        return known and device.type == "cpu" and library() is not None

    def takes_unasked(self, fmt: Format) -> bool:
        if isinstance(fmt, Sparse):
            return fmt.n < fmt.m
        return isinstance(fmt, Integer) and (fmt.bits <= MOST_BITS or fmt.activations == "int8")

    def prepare(self, fmt: Format, stored: list[Tensor], rows: int, cols: int) -> list[Tensor]:
        tensors = dict(zip(fmt.tensors(rows, cols), stored, strict=True))
        together = _library().rows_together
        if isinstance(fmt, Sparse):
            return cpu_sparse.prepare(fmt, tensors, rows, cols, together)
        assert isinstance(fmt, Integer)
        groups = tensors["weight_scales"].shape[1]
        if fmt.group_size > 0:
            groups = (cols + -cols % LINE) // fmt.group_size
        out = [_lines(fmt, tensors, rows, cols, together)]
        terms = [tensors["weight_scales"]]
        if not fmt.symmetric:
            terms.append(fmt.unpack_zeros(tensors["weight_zeros"], rows))
        for term in terms:
            missing = (0, groups - term.shape[1], 0, -rows % together)
            padded = torch.nn.functional.pad(term, missing, value=1)
            out.append(side_by_side(padded, together).clone())
        return out

    def matmul(self, fmt: Format, x: Tensor, prepared: Prepared, bias: Tensor | None) -> Tensor:
        inputs = x if x.dtype in DTYPES else x.float()
        if bias is not None and bias.dtype not in DTYPES:
            bias = bias.float()
        packed = _packed(fmt, prepared)
        return _library().linear(inputs, packed, bias, self._mode(fmt)).to(x.dtype)

    def operator(self, fmt: Format, prepared: Prepared) -> Operator | None:
        packed = _packed(fmt, prepared)
        if len(prepared.tensors) < 2:  # values that have no scales
            return None
        return Operator(_library().product, (self._mode(fmt), *packed.settings))

    def _mode(self, fmt: Format) -> Mode:
        values = fmt.values if isinstance(fmt, Sparse) else fmt
        if isinstance(values, Integer) and values.activations == "int8":
            return Mode.INT8_PER_TOKEN
        return self.mode

    def embed(self, fmt: Format, ids: Tensor, prepared: Prepared) -> Tensor:
        return _library().embed(ids, _packed(fmt, prepared))


class CpuExact(CpuGemm):
    """Activations as they are."""

    name: ClassVar[str] = "cpu_exact"
    mode: ClassVar[Mode] = Mode.EXACT

    def takes_unasked(self, fmt: Format) -> bool:
        return True


def _library() -> Library:
    loaded = library()
    assert loaded is not None
    return loaded


def _packed(fmt: Format, prepared: Prepared) -> Packed:
    if isinstance(fmt, Sparse):
        return cpu_sparse.packed(fmt, prepared)
    assert isinstance(fmt, Integer)
    weights, scales, *zeros = prepared.tensors
    group = max(0, fmt.group_size)
    settings = (prepared.rows, fmt.bits, group, prepared.cols)
    return Packed(weights, scales, zeros[0] if zeros else None, *settings)


def _lines(fmt: Integer, tensors: dict[str, Tensor], rows: int, cols: int, together: int) -> Tensor:
    """Weights as the library reads them, a slab of rows at a time."""
    lines, blocks = -(-cols // LINE), -(-rows // together)
    size = together * LINE * fmt.bits // 8
    out = empty_bytes(blocks, lines, size)
    unit = math.lcm(together, fmt.units(rows, cols)[0])  # zero points of some rows share bytes
    step = max(1, SLAB_ELEMENTS // cols // unit) * unit // together
    for block in range(0, blocks, step):
        first, last = block * together, min((block + step) * together, rows)
        part = fmt.slice(tensors, (rows, cols), rows=(first, last))
        codes = fmt.solution(part).codes
        missing = (0, lines * LINE - cols, 0, -(last - first) % together)
        codes = torch.nn.functional.pad(codes, missing)
        if together > 1:
            codes = side_by_side(codes.view(torch.int32), together).view(torch.uint8).flatten(1)
        elif fmt.bits == BYTE:
            codes = codes ^ SIGNED_SHIFT
        out[block : block + step] = pack_codes(codes, fmt.bits, LINE).reshape(-1, lines, size)
    return out
