"""Our own CPU product with integer weights of 2, 3, 4 and 8 bits, from any group size, and with
sparse ones of integers or 16-bit floats (`cpu_sparse`).

`cpu` quantizes activations to int8, one scale per token and 128 columns (or per token, where the
format asks for int8 activations). `cpu_exact` multiplies in float32, bfloat16 activations with AMX
in bfloat16, where products are exact and sums float32. Both look rows up, too. The table takes
`cpu` up to 4 bits, where it adds at most 3% to the divergence that the weights cause
(`python -m tests.benchmarks activations`), and for formats that ask for it; 8-bit weights lose so
little that it would treble their loss, so they get `cpu_exact`. Of sparse integers it takes all:
what leaving weights out costs is hundreds of times that.

Runtime layout: [weights uint8 [rows, lines, bytes], scales [rows, groups]], and zeros uint8 [rows,
groups] where stored. A line is 128 columns packed as format `integer` packs a block; columns are
padded with code 0 to whole lines, where activations are 0. 8-bit codes lose 128, to be signed.
Fails where no compiler is: the table then goes on to the next kernel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from compress_methods.formats.dense import Dense
from compress_methods.formats.integer import Integer, pack_codes
from compress_methods.formats.sparse import Sparse
from compress_methods.kernels import cpu_sparse
from compress_methods.kernels.base import Kernel, Operator
from compress_methods.kernels.cpu.library import DTYPES, LINE, Library, Mode, Packed, library

if TYPE_CHECKING:
    from compress_methods.formats.base import Format, Prepared

SIGNED_SHIFT = 0x80
MOST_BITS = 4


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
        if isinstance(fmt, Sparse):
            return cpu_sparse.prepare(fmt, tensors, rows, cols)
        assert isinstance(fmt, Integer)
        padding = -cols % LINE
        if fmt.block == LINE and fmt.bits != 8:
            weights = tensors["weight_packed"].clone()
        else:
            codes = fmt.solution(tensors).codes
            codes = torch.nn.functional.pad(codes, (0, padding))
            weights = pack_codes(codes, fmt.bits, LINE)
        if fmt.bits == 8:
            weights ^= SIGNED_SHIFT
        out = [weights.reshape(rows, (cols + padding) // LINE, -1), tensors["weight_scales"]]
        if not fmt.symmetric:
            out.append(fmt.unpack_zeros(tensors["weight_zeros"], rows))
        if fmt.group_size > 0:
            groups = padding // fmt.group_size
            out[1:] = [torch.nn.functional.pad(t, (0, groups), value=1) for t in out[1:]]
        return [t.clone(memory_format=torch.contiguous_format) for t in out]

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
    return Packed(weights, scales, zeros[0] if zeros else None, fmt.bits, group, prepared.cols)
