"""vLLM's own kernels for floats of 8 and 4 bits, in the layout of compressed-tensors checkpoints.

`fp8` goes to the chooser of 16-bit activations, or of 8-bit ones if its activations are; `mxfp4`
and `nvfp4` to those for 4 bits, with 16-bit activations. vLLM's `nvfp4` has one scale for a whole
matrix where ours has a power of two for each row: rows are brought to one by the exponents of their
groups' scales. Where a group's scale would leave E4M3 for that, the matrix is left to others.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import pad as pad_with_zeros

from compress_methods.formats import MAIN_TENSOR, Format, Stored
from compress_methods.formats.encoding.grouped import SCALES
from compress_methods.formats.encoding.small_floats import nearest_e4m3
from compress_methods.formats.floats import FP8, MXFP4, NVFP4, Float
from compress_methods.kernels import register_kernel
from vllm_compress.kernels.from_vllm import SCALE, FromVllm


@register_kernel
class VllmFp8(FromVllm):
    """E4M3 with a scale for a row, or for blocks of 128 x 128."""

    name: ClassVar[str] = "vllm_fp8"

    def takes(self, fmt: Format) -> bool:
        return isinstance(fmt, Float) and fmt.kind == FP8 and (by_row(fmt) or fmt.group_rows > 1)

    def choose(self, fmt: Float, rows: int, cols: int, dtype: torch.dtype) -> Any:
        from vllm.model_executor.kernels.linear import (
            init_fp8_linear_kernel,
            init_wfp8_a16_linear_kernel,
        )
        from vllm.model_executor.layers.quantization.utils import quant_utils as keys

        weights = keys.kFp8StaticChannelSym if by_row(fmt) else keys.kFp8Static128BlockSym
        options = {
            "weight_quant_key": weights,
            "weight_shape": (rows, cols),
            "input_dtype": dtype,
            "out_dtype": dtype,
        }
        if fmt.activations is None:
            found = init_wfp8_a16_linear_kernel(
                activation_quant_key=keys.kFp8DynamicTensorSym, **options
            )
        else:
            inputs = keys.kFp8DynamicTokenSym if by_row(fmt) else keys.kFp8Dynamic128Sym
            found = init_fp8_linear_kernel(activation_quant_key=inputs, **options)
        return found

    def register(self, layer: Any, stored: Stored, pad: int, dtype: torch.dtype) -> None:
        from vllm.model_executor.layers.quantization.utils.fp8_utils import (
            process_fp8_weight_channel_strategy,
        )

        fmt = stored.format
        assert isinstance(fmt, Float)
        codes = _padded(stored.tensors[MAIN_TENSOR].view(torch.uint8), pad)
        weight = codes.view(torch.float8_e4m3fn)
        scales = stored.tensors[SCALES].float()
        layer.orig_dtype, layer.input_scale, layer.weight_block_size = dtype, None, None
        if by_row(fmt):
            # AMD's MI300 has another E4M3, of which the same bits are half as much. vLLM's kernels
            # see to that for blocks only; of rows its own checkpoints' schemes do. What multiplies
            # rows wants columns first, and is told so.
            weight, scales, _ = process_fp8_weight_channel_strategy(weight, _padded(scales, pad))
            layer.register_parameter("weight", _parameter(weight, input_dim=0, output_dim=1))
            layer.register_parameter(SCALE, _parameter(scales))
            return
        layer.weight_block_size = [fmt.group_rows, fmt.group_size]
        layer.register_parameter("weight", _parameter(weight, input_dim=1, output_dim=0))
        missing = -(-len(weight) // fmt.group_rows) - len(scales)
        # With 16-bit activations vLLM knows the scales of blocks by another name.
        name = f"{SCALE}_inv" if fmt.activations is None else SCALE
        layer.register_parameter(name, _parameter(_padded(scales, missing)))


@register_kernel
class VllmFp4(FromVllm):
    """E2M1 with a power of two for 32 columns, or an E4M3 for 16."""

    name: ClassVar[str] = "vllm_fp4"

    def takes(self, fmt: Format) -> bool:
        return isinstance(fmt, Float) and fmt.kind in (MXFP4, NVFP4)

    def holds(self, stored: Stored) -> bool:
        fmt = stored.format
        assert isinstance(fmt, Float)
        return fmt.kind == MXFP4 or of_one_scale(fmt, stored) is not None

    def choose(self, fmt: Float, rows: int, cols: int, dtype: torch.dtype) -> Any:
        from vllm.model_executor.kernels.linear import (
            init_mxfp4_linear_kernel,
            init_nvfp4_linear_kernel,
        )

        if fmt.kind == MXFP4:
            return init_mxfp4_linear_kernel(activation_quant_key=None)
        return init_nvfp4_linear_kernel(use_a16=True)

    def register(self, layer: Any, stored: Stored, pad: int, dtype: torch.dtype) -> None:
        fmt = stored.format
        assert isinstance(fmt, Float)
        codes = _padded(fmt.solution(stored.tensors).codes, pad)
        pairs = codes[:, ::2] | codes[:, 1::2] << 4
        layer.register_parameter("weight", _parameter(pairs, input_dim=1, output_dim=0))
        if fmt.kind == MXFP4:
            layer.register_parameter(SCALE, _parameter(_padded(stored.tensors[SCALES], pad)))
            return
        found = of_one_scale(fmt, stored)
        assert found is not None
        scales, whole = found
        stored_as = _padded(scales, pad).to(torch.float8_e4m3fn)
        layer.register_parameter(SCALE, _parameter(stored_as))
        layer.register_parameter("weight_global_scale", _parameter(whole))


def by_row(fmt: Float) -> bool:
    """Whether a row has one scale."""
    return fmt.group_size < 0 and fmt.group_rows == 1


def of_one_scale(fmt: Float, stored: Stored) -> tuple[Tensor, Tensor] | None:
    """Groups' scales [rows, groups] and the one they are multiplied by; None where they leave
    E4M3."""
    solution = fmt.solution(stored.tensors)
    assert solution.of_rows is not None
    whole = solution.of_rows.max()
    scales = solution.scales * (solution.of_rows / whole)[:, None]
    return (scales, whole) if torch.equal(nearest_e4m3(scales), scales) else None


def _padded(rows: Tensor, count: int) -> Tensor:
    return pad_with_zeros(rows, (0, 0, 0, count)) if count else rows


def _parameter(tensor: Tensor, **dimensions: int) -> Parameter:
    """`input_dim` and `output_dim` say which is which to kernels that look."""
    made = Parameter(tensor, requires_grad=False)
    for name, value in dimensions.items():
        setattr(made, name, value)
    return made
