"""The weight-only CPU kernels that ship with torch, for the two layouts they know.

`_weight_int4pack_mm_for_cpu`: 4 bits in groups, value = (code - 8) * scale + zero.
`_weight_int8pack_mm`: 8 bits, one scale per row, symmetric. With int8 activations the same kernel
serves: int8 codes are exact in bfloat16, so the integer product is scaled per token afterwards.
Both take bfloat16 activations and accumulate in float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from compress_methods.formats.integer import Integer, quantize_per_token
from compress_methods.kernels.base import Kernel

if TYPE_CHECKING:
    from compress_methods.formats.base import Format, Prepared

ROW_TILE = 16


class TorchInt4(Kernel):
    name: ClassVar[str] = "torch_int4"

    def supports(self, fmt: Format, rows: int, cols: int, device: torch.device) -> bool:
        return (
            isinstance(fmt, Integer)
            and (fmt.bits, fmt.activations, device.type) == (4, None, "cpu")
            and fmt.group_size in (32, 64, 128)
            and rows % ROW_TILE == 0
        )

    def prepare(self, fmt: Format, stored: list[Tensor], rows: int, cols: int) -> list[Tensor]:
        assert isinstance(fmt, Integer)
        solution = fmt.solution(dict(zip(fmt.tensors(rows, cols), stored, strict=True)))
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(solution.codes.int(), 1)
        scales = solution.scales.float()
        zeros = torch.zeros_like(scales)
        if solution.zeros is not None:
            zeros = (8 - solution.zeros.float()) * scales
        return [packed, torch.stack([scales, zeros], -1).transpose(0, 1).bfloat16().contiguous()]

    def matmul(self, fmt: Format, x: Tensor, prepared: Prepared, bias: Tensor | None) -> Tensor:
        assert isinstance(fmt, Integer)
        packed, scales_and_zeros = prepared.tensors
        out = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x.bfloat16().contiguous(), packed, fmt.group_size, scales_and_zeros
        )
        return (out if bias is None else out + bias).to(x.dtype)


class TorchInt8(Kernel):
    name: ClassVar[str] = "torch_int8"
    gathers: ClassVar[bool] = True

    def supports(self, fmt: Format, rows: int, cols: int, device: torch.device) -> bool:
        return (
            isinstance(fmt, Integer)
            and (fmt.bits, fmt.group_size, fmt.symmetric, device.type) == (8, -1, True, "cpu")
            and rows % ROW_TILE == 0
        )

    def prepare(self, fmt: Format, stored: list[Tensor], rows: int, cols: int) -> list[Tensor]:
        assert isinstance(fmt, Integer)
        solution = fmt.solution(dict(zip(fmt.tensors(rows, cols), stored, strict=True)))
        signed = (solution.codes.short() - 128).to(torch.int8)
        return [signed.contiguous(), solution.scales.reshape(-1).clone()]

    def matmul(self, fmt: Format, x: Tensor, prepared: Prepared, bias: Tensor | None) -> Tensor:
        assert isinstance(fmt, Integer)
        weight, scales = prepared.tensors
        token_scale: Tensor | None = None
        inputs = x
        if fmt.activations == "int8":
            inputs, token_scale = quantize_per_token(x)
        out = torch._weight_int8pack_mm(inputs.bfloat16().contiguous(), weight, scales.bfloat16())
        if token_scale is not None:
            out = out * token_scale
        return (out if bias is None else out + bias).to(x.dtype)

    def embed(self, fmt: Format, ids: Tensor, prepared: Prepared) -> Tensor:
        weight, scales = prepared.tensors
        return weight[ids].float() * scales[ids].float()[:, None]
