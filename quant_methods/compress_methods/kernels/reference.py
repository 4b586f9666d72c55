"""Plain torch: unpack, then multiply. Works for every format on every device; the truth that
faster kernels are tested against.

Stays in the stored layout, so memory is the compressed size plus one slab of unpacked rows. Slow:
it unpacks the matrix at every call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from compress_methods.kernels.base import Kernel

if TYPE_CHECKING:
    from compress_methods.formats.base import Format, Prepared

SLAB_ELEMENTS = 2**22


class Reference(Kernel):
    name: ClassVar[str] = "reference"
    gathers: ClassVar[bool] = True

    def supports(self, fmt: Format, rows: int, cols: int, device: torch.device) -> bool:
        return True

    def prepare(self, fmt: Format, stored: list[Tensor], rows: int, cols: int) -> list[Tensor]:
        return [t.clone(memory_format=torch.contiguous_format) for t in stored]

    def matmul(self, fmt: Format, x: Tensor, prepared: Prepared, bias: Tensor | None) -> Tensor:
        rows, cols = prepared.rows, prepared.cols
        stored = dict(zip(fmt.tensors(rows, cols), prepared.tensors, strict=True))
        inputs = fmt.quantize_activations(x.float())
        out = torch.empty(x.shape[0], rows, dtype=torch.float32, device=x.device)
        unit = fmt.units(rows, cols)[0]
        slab = max(unit, SLAB_ELEMENTS // cols // unit * unit)
        for start in range(0, rows, slab):
            end = min(start + slab, rows)
            weight = fmt.unpack(fmt.slice(stored, (rows, cols), rows=(start, end)))
            torch.mm(inputs, weight[: end - start].T, out=out[:, start:end])
        if bias is not None:
            out += bias
        return out.to(x.dtype)

    def embed(self, fmt: Format, ids: Tensor, prepared: Prepared) -> Tensor:
        rows, cols = prepared.rows, prepared.cols
        specs = fmt.tensors(rows, cols)
        unit = fmt.units(rows, cols)[0]
        blocks, inverse = torch.unique(ids // unit, return_inverse=True)
        gathered = {}
        for (name, spec), tensor in zip(specs.items(), prepared.tensors, strict=True):
            axis = spec.rows_axis
            if axis is None:
                gathered[name] = tensor
                continue
            width = unit // axis.unit * axis.step
            index = blocks[:, None] * width + torch.arange(width, device=ids.device)
            last = tensor.shape[axis.axis] - 1
            gathered[name] = tensor.index_select(axis.axis, index.flatten().clamp_(max=last))
        return fmt.unpack(gathered)[inverse * unit + ids % unit]
