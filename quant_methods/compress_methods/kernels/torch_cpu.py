"""The weight-only CPU kernels that ship with torch, for the two layouts they know.

`_weight_int4pack_mm_for_cpu`: 4 bits in groups, value = (code - 8) * scale + zero.
`_weight_int8pack_mm`: 8 bits, one scale per row, symmetric. With int8 activations the same kernel
serves: int8 codes are exact in bfloat16, so the integer product is scaled per token afterwards.
Both take bfloat16 activations and accumulate in float32.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from compress_methods.formats import Stored
from compress_methods.formats.integer import Integer, IntegerSolution, quantize_per_token
from compress_methods.kernels.base import Kernel, Prepared, Want, check_ids, register_kernel

ROW_TILE = 16
RANK = 100


def _solution(stored: Stored) -> IntegerSolution:
    assert isinstance(stored.format, Integer)
    return stored.format.solution(stored.tensors)


@register_kernel
class TorchInt4(Kernel):
    name: ClassVar[str] = "torch_int4"

    def rank(self, stored: Stored, want: Want) -> int | None:
        fmt = stored.format
        able = (
            isinstance(fmt, Integer)
            and (fmt.bits, fmt.activations, stored.device.type) == (4, None, "cpu")
            and fmt.group_size in (32, 64, 128)
            and stored.size[0] % ROW_TILE == 0
            and not want.embed
        )
        return RANK if able else None

    def prepare(self, stored: Stored, want: Want) -> Prepared:
        solution = _solution(stored)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(solution.codes.int(), 1)
        scales = solution.scales.float()
        zeros = torch.zeros_like(scales)
        if solution.zeros is not None:
            zeros = (8 - solution.zeros.float()) * scales
        pairs = torch.stack([scales, zeros], -1).transpose(0, 1).bfloat16().contiguous()
        return Prepared(self.name, *stored.size, [packed, pairs], stored.format)

    def matmul(self, x: Tensor, prepared: Prepared, bias: Tensor | None) -> Tensor:
        assert isinstance(prepared.format, Integer)
        packed, scales_and_zeros = prepared.tensors
        out = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x.bfloat16().contiguous(), packed, prepared.format.group_size, scales_and_zeros
        )
        return (out if bias is None else out + bias).to(x.dtype)


@register_kernel
class TorchInt8(Kernel):
    name: ClassVar[str] = "torch_int8"

    def rank(self, stored: Stored, want: Want) -> int | None:
        fmt = stored.format
        able = (
            isinstance(fmt, Integer)
            and (fmt.bits, fmt.group_size, fmt.symmetric) == (8, -1, True)
            and stored.device.type == "cpu"
            and stored.size[0] % ROW_TILE == 0
        )
        return RANK if able else None

    def prepare(self, stored: Stored, want: Want) -> Prepared:
        solution = _solution(stored)
        signed = (solution.codes.short() - 128).to(torch.int8).contiguous()
        tensors = [signed, solution.scales.reshape(-1).clone()]
        return Prepared(self.name, *stored.size, tensors, stored.format)

    def matmul(self, x: Tensor, prepared: Prepared, bias: Tensor | None) -> Tensor:
        assert isinstance(prepared.format, Integer)
        weight, scales = prepared.tensors
        token_scale: Tensor | None = None
        inputs = x
        if prepared.format.activations == "int8":
            inputs, token_scale = quantize_per_token(x)
        out = torch._weight_int8pack_mm(inputs.bfloat16().contiguous(), weight, scales.bfloat16())
        if token_scale is not None:
            out = out * token_scale
        return (out if bias is None else out + bias).to(x.dtype)

    def embed(self, ids: Tensor, prepared: Prepared) -> Tensor:
        check_ids(ids, prepared.rows)
        weight, scales = prepared.tensors
        return weight[ids].float() * scales[ids].float()[:, None]
