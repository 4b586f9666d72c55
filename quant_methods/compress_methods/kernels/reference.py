"""Plain torch: unpack, then multiply. Works for every format on every device; the truth that
faster kernels are tested against.

Stays in the stored layout, so memory is the compressed size plus one slab of unpacked rows. Slow:
it unpacks the matrix at every call.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from compress_methods.formats import Stored
from compress_methods.kernels.base import Kernel, Prepared, Want, check_ids, register_kernel

SLAB_ELEMENTS = 2**22


@register_kernel
class Reference(Kernel):
    name: ClassVar[str] = "reference"

    def rank(self, stored: Stored, want: Want) -> int | None:
        return 0

    def prepare(self, stored: Stored, want: Want) -> Prepared:
        tensors = [t.clone(memory_format=torch.contiguous_format) for t in stored.ordered]
        place = {"shape": stored.shape, "rows": stored.rows, "cols": stored.cols}
        return Prepared(self.name, *stored.size, tensors, stored.format, facts=place)

    def matmul(self, x: Tensor, prepared: Prepared, bias: Tensor | None) -> Tensor:
        stored = stored_of(prepared)
        inputs = stored.format.quantize_activations(x.float())
        out = torch.empty(len(x), prepared.rows, dtype=torch.float32, device=x.device)
        start = 0
        for weight in self.slabs(stored):
            torch.mm(inputs, weight.T, out=out[:, start : start + len(weight)])
            start += len(weight)
        if bias is not None:
            out += bias
        return out.to(x.dtype)

    def slabs(self, stored: Stored) -> Iterator[Tensor]:
        """All rows [n, cols] float32 in order, unpacked a few at a time."""
        rows, cols = stored.size
        step = rows
        if stored.cuts_rows:
            unit = stored.format.alignment(*stored.shape)[0]
            step = max(unit, SLAB_ELEMENTS // cols // unit * unit)
        at = stored.rows[0]
        for start in range(0, rows, step):
            yield stored.cut(rows=(at + start, at + min(start + step, rows))).values()

    def embed(self, ids: Tensor, prepared: Prepared) -> Tensor:
        check_ids(ids, prepared.rows)
        stored = stored_of(prepared)
        # How many blocks there are to unpack decides sizes, which no GPU may wait for.
        if not stored.cuts_rows or ids.device.type != "cpu":
            return stored.values()[ids]
        unit = stored.format.alignment(*stored.shape)[0]
        blocks, inverse = torch.unique(ids // unit, return_inverse=True)
        gathered = {}
        for name, spec in stored.specs.items():
            axis, tensor = spec.rows_axis, stored.tensors[name]
            gathered[name] = tensor
            if axis is not None:
                width = unit // axis.unit * axis.step
                index = blocks[:, None] * width + torch.arange(width, device=ids.device)
                # The last block may have fewer, and formats may look at how many there are.
                there = index[index < tensor.shape[axis.axis]]
                gathered[name] = tensor.index_select(axis.axis, there)
        values = stored.format.unpack(gathered)
        if not stored.cuts_cols:
            values = values[:, slice(*stored.cols)]
        return values[inverse * unit + ids % unit]


def stored_of(prepared: Prepared) -> Stored:
    """The stored piece that a prepared one still is."""
    fmt, facts = prepared.format, prepared.facts
    assert fmt is not None
    shape, rows, cols = (tuple(facts[key]) for key in ("shape", "rows", "cols"))
    tensors = dict(zip(fmt.tensors(*shape), prepared.tensors, strict=True))
    return Stored(fmt, tensors, shape, rows, cols)
