"""vLLM's own kernels for the formats they know: Marlin, Machete and their like.

Chosen on GPUs; elsewhere only where VLLM_COMPRESS_KERNEL=vllm insists. Integer weights of 4 or 8
bits go to vLLM's mixed-precision chooser in the layout of compressed-tensors checkpoints; 8 bits,
one symmetric scale per row and int8 activations go to its int8 chooser. Which kernel runs is vLLM's
decision. Where it has none, the table of `compress_methods.kernels` is used instead (or, insisted,
it is an error that carries vLLM's reasons).
"""

from __future__ import annotations

from collections.abc import Sequence
from logging import getLogger
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn.functional import pad as pad_with_zeros

from compress_methods.errors import CheckpointError
from compress_methods.formats import Format
from compress_methods.formats.integer import Integer, IntegerSolution
from vllm_compress.layers.loading import Matrix
from vllm_compress.layers.ops import KERNEL_VARIABLE, forced_kernel

logger = getLogger("vllm.vllm_compress")
WEIGHT, SCALE, ZERO = "weight_packed", "weight_scale", "weight_zero_point"


class VllmKernel:
    """A kernel of vLLM and the layer's parameters as it wants them."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def apply(self, layer: Module, x: Tensor, bias: Tensor | None) -> Tensor:
        return self.kernel.apply_weights(layer, x, bias)


def build(
    layer: Any,
    fmt: Format,
    pieces: Sequence[Matrix],
    cols: int,
    dtype: torch.dtype,
    stored: Sequence[str],
    pad: int = 0,
) -> VllmKernel | None:
    """vLLM's kernel for the layer, which then holds its parameters; None where ours is used."""
    device = pieces[0][0][WEIGHT].device
    if not _wanted(fmt, device) or len(pieces) != 1 or not isinstance(fmt, Integer):
        return None
    tensors, rows = pieces[0]
    choose = _int8 if fmt.activations == "int8" else _mixed_precision
    try:
        kernel = choose(fmt, rows + pad, cols, dtype)
        _require_instructions(kernel, dtype)
    except (ValueError, NotImplementedError, AssertionError) as problem:
        if forced_kernel() == "vllm":
            reasons = " ".join(str(problem).split())
            raise CheckpointError(
                f"{KERNEL_VARIABLE}=vllm, but vLLM has no kernel for {fmt.describe()} on "
                f"{device.type}: {reasons}"
            ) from None
        logger.warning("vLLM has no kernel for %s [%d, %d]", fmt.describe(), rows + pad, cols)
        return None
    for name in stored:
        delattr(layer, name)
    solution = _padded(fmt.solution(tensors), pad)
    layer.input_size_per_partition, layer.output_size_per_partition = cols, rows + pad
    layer.logical_widths = [rows + pad]
    layer.params_dtype = dtype
    if fmt.activations == "int8":
        _register_int8(layer, solution)
    else:
        _register_mixed_precision(layer, fmt, solution, dtype)
    kernel.process_weights_after_loading(layer)
    return VllmKernel(kernel)


def _wanted(fmt: Format, device: torch.device) -> bool:
    """Whether to ask vLLM for a kernel at all."""
    if not isinstance(fmt, Integer) or forced_kernel() not in (None, "vllm"):
        return False
    if device.type == "cpu" and forced_kernel() is None:
        return False
    if fmt.activations == "int8":
        return (fmt.bits, fmt.group_size, fmt.symmetric) == (8, -1, True)
    return fmt.bits in (4, 8)


def _mixed_precision(fmt: Integer, rows: int, cols: int, dtype: torch.dtype) -> Any:
    from vllm.model_executor.kernels.linear import choose_mp_linear_kernel
    from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import (
        MPLinearLayerConfig,
    )
    from vllm.scalar_type import scalar_types

    kinds = {
        (4, True): scalar_types.uint4b8,
        (8, True): scalar_types.uint8b128,
        (4, False): scalar_types.uint4,
        (8, False): scalar_types.uint8,
    }
    config = MPLinearLayerConfig(
        full_weight_shape=(cols, rows),
        partition_weight_shape=(cols, rows),
        weight_type=kinds[fmt.bits, fmt.symmetric],
        act_type=dtype,
        group_size=fmt.group_size,
        zero_points=not fmt.symmetric,
    )
    return choose_mp_linear_kernel(config)(
        config, w_q_param_name=WEIGHT, w_s_param_name=SCALE, w_zp_param_name=ZERO
    )


def _require_instructions(kernel: Any, dtype: torch.dtype) -> None:
    """vLLM's CPU choosers name kernels that this processor cannot run, or runs wrongly: without
    VNNI, oneDNN's int8 products saturate at 16 bits (seen as a third of the value lost); with AMX
    others are taken, which know 16 bits only."""
    name = type(kernel).__name__
    if name == "CPUWNA16LinearKernel" and not hasattr(torch.ops._C, "cpu_gemm_wna16"):
        raise ValueError(f"{name} is not in this build of vLLM, which is for AVX2")
    if name == "CPUInt8ScaledMMLinearKernel" and not torch.cpu._is_vnni_supported():
        raise ValueError(f"{name} needs VNNI to be exact")
    amx = torch.cpu._is_amx_tile_supported()
    if name == "CPUInt8ScaledMMLinearKernel" and amx and dtype == torch.float32:
        raise ValueError(f"{name} takes float32 only where there is no AMX")


def _int8(fmt: Integer, rows: int, cols: int, dtype: torch.dtype) -> Any:
    from vllm.model_executor.kernels.linear import init_int8_linear_kernel

    return init_int8_linear_kernel(
        is_channelwise=True,
        is_static_input_scheme=False,
        input_symmetric=True,
        module_name="vllm_compress",
    )


def _padded(solution: IntegerSolution, rows: int) -> IntegerSolution:
    """With `rows` rows of zero scale below: the logits of vocabulary padding."""
    if not rows:
        return solution
    below = (0, 0, 0, rows)
    zeros = None if solution.zeros is None else pad_with_zeros(solution.zeros, below)
    return IntegerSolution(
        pad_with_zeros(solution.codes, below), pad_with_zeros(solution.scales, below), zeros
    )


def _register_mixed_precision(
    layer: Any, fmt: Integer, solution: IntegerSolution, dtype: torch.dtype
) -> None:
    from vllm.model_executor.parameter import GroupQuantScaleParameter, PackedvLLMParameter

    def loader(*_: Any) -> None:
        raise RuntimeError("compressed weights cannot be loaded again")

    packed = {"input_dim": 1, "output_dim": 0, "weight_loader": loader}
    factor = 32 // fmt.bits
    layer.register_parameter(
        WEIGHT,
        PackedvLLMParameter(
            data=pack_int32(solution.codes, fmt.bits), packed_dim=1, packed_factor=factor, **packed
        ),
    )
    layer.register_parameter(
        SCALE, GroupQuantScaleParameter(data=solution.scales.to(dtype).contiguous(), **packed)
    )
    if solution.zeros is not None:
        zeros = pack_int32(solution.zeros.T, fmt.bits).T.contiguous()
        layer.register_parameter(
            ZERO, PackedvLLMParameter(data=zeros, packed_dim=0, packed_factor=factor, **packed)
        )


def _register_int8(layer: Any, solution: IntegerSolution) -> None:
    signed = (solution.codes.short() - 128).to(torch.int8).contiguous()
    layer.register_parameter("weight", Parameter(signed, requires_grad=False))
    scale = Parameter(solution.scales.float().reshape(-1, 1), requires_grad=False)
    layer.register_parameter(SCALE, scale)
    for name in ("input_scale", "input_zero_point", "azp_adj"):
        layer.register_parameter(name, None)


def pack_int32(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [n, m] -> int32 [n, m*bits/32], first code in the lowest bits."""
    lanes = codes.to(torch.int64).unflatten(1, (-1, 32 // bits))
    shifts = torch.arange(0, 32, bits, device=codes.device)
    return (lanes << shifts).sum(-1).to(torch.int32).contiguous()
