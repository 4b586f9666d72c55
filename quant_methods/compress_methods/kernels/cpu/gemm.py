"""Our own CPU product with integer weights of 2 to 6 and of 8 bits, from any group size, with those
of tables (`lookup.py`), floats of 4 and 8 bits (`floats.py`), trellises (`trellis.py`), and with
sparse ones of integers or 16-bit floats (`sparse.py`).

`cpu` quantizes activations to int8, one scale per token and 128 columns (or per token, where the
format asks for int8 activations). `cpu_exact` multiplies in float32, bfloat16 activations in
bfloat16 where the processor can, products being exact and sums float32. Both look rows up, too. The
table takes `cpu` up to 4 bits, where it adds at most 3% to the divergence that the weights cause
(`python -m tests.benchmarks activations`), and for formats that ask for it; 8-bit weights lose so
little that it would treble their loss, so they get `cpu_exact`, which alone takes floats of 8 bits
and of 16, and tables of floats. Of sparse integers it takes all: leaving weights out costs hundreds
of times as much.

Runtime layout: [weights uint8 [blocks, lines, bytes], scales [blocks, groups, together]], and zeros
uint8 like scales where stored. A line is 128 columns of as many rows as the library takes together
(16 with AVX-512, else one and no last dimension), in pieces of 128 codes packed as format `integer`
packs a block: with 16 rows a piece is 2 x 16 rows x 4 columns. Rows and columns are padded to whole
lines, where activations are 0. Row by row, 8-bit codes lose 128, to be signed.
Fails where no compiler is: the table then goes on to the next kernel.
"""

from __future__ import annotations

import math
from typing import ClassVar, TypeGuard

import torch
from torch import Tensor

from compress_methods.formats import Format, Stored
from compress_methods.formats.dense import Dense
from compress_methods.formats.encoding.codes import pack_codes
from compress_methods.formats.encoding.grouped import SCALES
from compress_methods.formats.floats import Float
from compress_methods.formats.integer import ZEROS, Integer
from compress_methods.formats.lookup import Lookup
from compress_methods.formats.sparse import Sparse
from compress_methods.formats.trellis import Trellis
from compress_methods.kernels.base import Kernel, Operator, Prepared, Want, register_kernel
from compress_methods.kernels.cpu import floats as cpu_floats
from compress_methods.kernels.cpu import lookup as cpu_lookup
from compress_methods.kernels.cpu import sparse as cpu_sparse
from compress_methods.kernels.cpu import trellis as cpu_trellis
from compress_methods.kernels.cpu.library import (
    DTYPES,
    LINE,
    Kind,
    Library,
    Mode,
    Packed,
    empty_bytes,
    library,
    side_by_side,
)

SIGNED_SHIFT = 0x80
BYTE = 8
CODED = Integer | Lookup | Float | Trellis
MOST_BITS = 4
SLAB_ELEMENTS = 2**22
RANK, PLAIN_RANK = 200, 50
"""Plain C++ comes after torch's kernels, which have vectors of their own on every processor."""


@register_kernel
class CpuGemm(Kernel):
    """int8 activations."""

    name: ClassVar[str] = "cpu"
    mode: ClassVar[Mode] = Mode.INT8_PER_LINE
    behind: ClassVar[int] = 0

    def rank(self, stored: Stored, want: Want) -> int | None:
        if stored.device.type != "cpu" or not self._knows(stored.format):
            return None
        if not (self.wanted(want) or self._costs_little(stored.format)):
            return None
        loaded = library()
        if loaded is None:
            return None
        return (PLAIN_RANK if loaded.isa == "plain" else RANK) - self.behind

    def _knows(self, fmt: Format) -> bool:
        if isinstance(fmt, Float):
            return fmt.bits < BYTE or self.mode == Mode.EXACT
        if isinstance(fmt, Lookup) and fmt.of_floats:
            return self.mode == Mode.EXACT
        if not isinstance(fmt, Sparse):
            return isinstance(fmt, CODED)
        exact = isinstance(fmt.values, Dense)
        return cpu_sparse.takes(fmt) and (not exact or self.mode == Mode.EXACT)

    def _costs_little(self, fmt: Format) -> bool:
        """Whether it may be chosen by itself: not where it would cost quality that shows."""
        if isinstance(fmt, Sparse):
            return fmt.n < fmt.m
        if isinstance(fmt, Lookup | Float | Trellis):
            return True
        return isinstance(fmt, Integer) and (fmt.bits <= MOST_BITS or fmt.activations == "int8")

    def prepare(self, stored: Stored, want: Want) -> Prepared:
        fmt, (rows, cols) = stored.format, stored.size
        together = _library().rows_together
        if isinstance(fmt, Sparse):
            tensors = cpu_sparse.prepare(stored, together)
            return Prepared(self.name, rows, cols, tensors, fmt)
        assert isinstance(fmt, CODED)
        groups = stored.tensors[SCALES].shape[1]
        if fmt.group_size > 0:
            groups = (cols + -cols % LINE) // fmt.group_size
        lines = cpu_trellis.lines if isinstance(fmt, Trellis) else _lines
        out = [lines(stored, together)]
        if isinstance(fmt, Float):
            out += cpu_floats.terms(stored, groups, together)
            return Prepared(self.name, rows, cols, out, fmt)
        for term in _terms(stored):
            missing = (0, groups - term.shape[1], 0, -rows % together)
            padded = torch.nn.functional.pad(term, missing, value=1)
            out.append(side_by_side(padded, together).clone())
        if isinstance(fmt, Lookup):
            out.append(cpu_lookup.tables(stored, together))
        return Prepared(self.name, rows, cols, out, fmt)

    def matmul(self, x: Tensor, prepared: Prepared, bias: Tensor | None) -> Tensor:
        inputs = x if x.dtype in DTYPES else x.float()
        if quantizes(prepared.format):
            inputs = prepared.format.quantize_activations(x.float())
        if bias is not None and bias.dtype not in DTYPES:
            bias = bias.float()
        mode = self._mode(prepared.format)
        return _library().linear(inputs, _packed(prepared), bias, mode).to(x.dtype)

    def operator(self, prepared: Prepared) -> Operator | None:
        if len(prepared.tensors) < 2:  # values that have no scales
            return None
        if quantizes(prepared.format):
            return None
        settings = (self._mode(prepared.format), *_packed(prepared).settings)
        return Operator(_library().product, settings)

    def rotated(self, prepared: Prepared) -> Operator | None:
        plain = self.operator(prepared)
        return None if plain is None else Operator(_library().rotated, plain.settings)

    def corrected(self, prepared: Prepared) -> Operator | None:
        plain = self.operator(prepared)
        return None if plain is None else Operator(_library().corrected, plain.settings)

    def _mode(self, fmt: Format | None) -> Mode:
        values = fmt.values if isinstance(fmt, Sparse) else fmt
        if isinstance(values, Integer) and values.activations == "int8":
            return Mode.INT8_PER_TOKEN
        return self.mode

    def embed(self, ids: Tensor, prepared: Prepared) -> Tensor:
        return _library().embed(ids, _packed(prepared))


@register_kernel
class CpuExact(CpuGemm):
    """Activations as they are."""

    name: ClassVar[str] = "cpu_exact"
    mode: ClassVar[Mode] = Mode.EXACT
    behind: ClassVar[int] = 1

    def _costs_little(self, fmt: Format) -> bool:
        return True


def quantizes(fmt: Format | None) -> TypeGuard[Float]:
    """Whether inputs become floats of 8 bits before they are multiplied."""
    return isinstance(fmt, Float) and fmt.activations is not None


def _library() -> Library:
    loaded = library()
    assert loaded is not None
    return loaded


def _packed(prepared: Prepared) -> Packed:
    fmt = prepared.format
    if isinstance(fmt, Sparse):
        return cpu_sparse.packed(fmt, prepared)
    assert isinstance(fmt, CODED)
    weights, scales, *zeros = prepared.tensors
    settings = (prepared.rows, fmt.bits, max(0, fmt.group_size), prepared.cols)
    return Packed(weights, scales, zeros[0] if zeros else None, *settings, _kind(fmt))


def _terms(stored: Stored) -> list[Tensor]:
    """What groups have: scales, halved where codes count twice, and zeros where stored."""
    fmt, scales = stored.format, stored.tensors[SCALES]
    if not isinstance(fmt, Integer):
        return [scales]
    if not fmt.symmetric:
        return [scales, fmt.unpack_zeros(stored.tensors[ZEROS], stored.size[0])]
    if fmt.holds_zero:
        return [scales]
    halves = scales.float() / 2
    return [halves if scales.dtype == torch.float16 else halves.to(scales.dtype)]


def _kind(fmt: Integer | Lookup | Float | Trellis) -> int:
    if isinstance(fmt, Trellis):
        return cpu_trellis.kind(fmt)
    if isinstance(fmt, Float):
        return Kind.FLOATS
    if isinstance(fmt, Lookup):
        return Kind.VALUES if fmt.of_floats else Kind.LOOKUP
    return Kind.WHOLE if fmt.holds_zero else Kind.MID


def _lines(stored: Stored, together: int) -> Tensor:
    """Weights as the library reads them, a slab of rows at a time."""
    fmt, (rows, cols) = stored.format, stored.size
    assert isinstance(fmt, Integer | Lookup | Float)
    lines, blocks = -(-cols // LINE), -(-rows // together)
    size = together * LINE * fmt.bits // 8
    out = empty_bytes(blocks, lines, size)
    # Zero points of some rows share bytes.
    unit = math.lcm(together, fmt.alignment(*stored.shape)[0])
    step = max(1, SLAB_ELEMENTS // cols // unit) * unit // together
    for block in range(0, blocks, step):
        first, last = block * together, min((block + step) * together, rows)
        at = stored.rows[0]
        codes = fmt.solution(stored.cut(rows=(at + first, at + last)).tensors).codes
        missing = (0, lines * LINE - cols, 0, -(last - first) % together)
        codes = torch.nn.functional.pad(codes, missing)
        if fmt.bits == BYTE and isinstance(fmt, Float):
            by_columns = side_by_side(codes, together)
            out[block : block + step] = by_columns.reshape(-1, lines, size)
            continue
        if together > 1:
            codes = side_by_side(codes.view(torch.int32), together).view(torch.uint8).flatten(1)
        elif fmt.bits == BYTE:
            codes = codes ^ SIGNED_SHIFT
        out[block : block + step] = pack_codes(codes, fmt.bits, LINE).reshape(-1, lines, size)
    return out
