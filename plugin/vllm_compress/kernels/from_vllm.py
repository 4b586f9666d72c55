"""vLLM's own kernels as entries of the one table: Marlin, Machete and their like.

They rank first on GPUs; elsewhere they are taken only where VLLM_COMPRESS_KERNEL=vllm insists.
Integer weights go to vLLM's mixed-precision chooser in the layout of compressed-tensors
checkpoints, those of 2, 3, 5 and 6 bits to Humming; 8 bits, one symmetric scale per row and int8
activations go to its int8 chooser. Floats are in `from_vllm_floats.py`. Which kernel runs is vLLM's
decision. Where it has none the next rank is taken (or, insisted, it is an error that carries vLLM's
reasons). Levels between whole numbers, `mid`, are in no type of vLLM's and so left to others.
"""

from __future__ import annotations

from abc import abstractmethod
from fractions import Fraction
from logging import getLogger
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import pad as pad_with_zeros
from vllm.platforms import current_platform

from compress_methods.errors import CheckpointError
from compress_methods.formats import Format, Stored
from compress_methods.formats.integer import Integer, IntegerSolution
from compress_methods.kernels import Kernel, Operator, Prepared, Want, register_kernel
from vllm_compress.names import KERNEL_VARIABLE

logger = getLogger("vllm.vllm_compress")
WEIGHT, SCALE, ZERO = "weight_packed", "weight_scale", "weight_zero_point"
RANK = 300


class FromVllm(Kernel):
    """A kernel of vLLM; its parameters belong to the layer that `Want.host` is."""

    answers_to: ClassVar[tuple[str, ...]] = ("vllm",)
    pads: ClassVar[bool] = True

    @abstractmethod
    def takes(self, fmt: Format) -> bool:
        """Whether it is for such a format."""

    def holds(self, stored: Stored) -> bool:
        """Whether it is for the values of such a matrix, whose format it takes."""
        return True

    @abstractmethod
    def choose(self, fmt: Any, rows: int, cols: int, dtype: torch.dtype) -> Any:
        """vLLM's choice of kernel; raises where there is none."""

    @abstractmethod
    def register(self, layer: Any, stored: Stored, pad: int, dtype: torch.dtype) -> None:
        """Give the layer the parameters that the kernel looks for, with `pad` rows of zero."""

    def rank(self, stored: Stored, want: Want) -> int | None:
        fmt, insisted = stored.format, self.wanted(want)
        asked = insisted or (want.kernel is None and stored.device.type != "cpu")
        if not asked or want.embed or want.host is None or want.dtype is None:
            return None
        if not (self.takes(fmt) and self.holds(stored)):
            return None
        rows, cols = stored.size[0] + want.pad, stored.size[1]
        try:
            require_instructions(self.choose(fmt, rows, cols, want.dtype), want.dtype)
        except (ValueError, NotImplementedError, AssertionError) as problem:
            reasons = " ".join(str(problem).split())
            what = f"{fmt.describe()} on {stored.device.type}"
            if insisted:
                raise CheckpointError(
                    f"{KERNEL_VARIABLE}=vllm, but vLLM has no kernel for {what}: {reasons}"
                ) from None
            logger.warning("vLLM has no kernel for %s [%d, %d]: %s", what, rows, cols, reasons)
            return None
        return RANK

    def prepare(self, stored: Stored, want: Want) -> Prepared:
        fmt, layer = stored.format, want.host
        assert want.dtype is not None
        rows, cols = stored.size[0] + want.pad, stored.size[1]
        chosen = self.choose(fmt, rows, cols, want.dtype)
        layer.input_size_per_partition, layer.output_size_per_partition = cols, rows
        layer.logical_widths = [rows]
        layer.params_dtype = want.dtype
        self.register(layer, stored, want.pad, want.dtype)
        chosen.process_weights_after_loading(layer)
        return Prepared(self.name, rows, cols, format=fmt, handle=(chosen, layer))

    def operator(self, prepared: Prepared) -> Operator:
        chosen, layer = prepared.handle
        return Operator(lambda x, bias: chosen.apply_weights(layer, x, bias), ())

    def matmul(self, x: Tensor, prepared: Prepared, bias: Tensor | None) -> Tensor:
        return self.operator(prepared).function(x, bias)


@register_kernel
class VllmMixedPrecision(FromVllm):
    """16-bit activations, integer weights in groups or rows."""

    name: ClassVar[str] = "vllm_mixed_precision"

    def takes(self, fmt: Format) -> bool:
        return isinstance(fmt, Integer) and fmt.activations is None and fmt.holds_zero

    def choose(self, fmt: Integer, rows: int, cols: int, dtype: torch.dtype) -> Any:
        from vllm.model_executor.kernels.linear import choose_mp_linear_kernel
        from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import (
            MPLinearLayerConfig,
        )
        from vllm.scalar_type import scalar_types

        kind = f"uint{fmt.bits}" + (f"b{2 ** (fmt.bits - 1)}" if fmt.symmetric else "")
        config = MPLinearLayerConfig(
            full_weight_shape=(cols, rows),
            partition_weight_shape=(cols, rows),
            weight_type=getattr(scalar_types, kind),
            act_type=dtype,
            group_size=fmt.group_size,
            zero_points=not fmt.symmetric,
        )
        return choose_mp_linear_kernel(config)(
            config, w_q_param_name=WEIGHT, w_s_param_name=SCALE, w_zp_param_name=ZERO
        )

    def register(self, layer: Any, stored: Stored, pad: int, dtype: torch.dtype) -> None:
        from vllm.model_executor.parameter import GroupQuantScaleParameter, PackedvLLMParameter

        fmt = stored.format
        assert isinstance(fmt, Integer)
        solution = padded(fmt.solution(stored.tensors), pad)

        def loader(*_: Any) -> None:
            raise RuntimeError("compressed weights cannot be loaded again")

        shared = {"input_dim": 1, "output_dim": 0, "weight_loader": loader}
        factor = Fraction(32, fmt.bits)
        codes = pack_int32(solution.codes, fmt.bits)
        packed = PackedvLLMParameter(data=codes, packed_dim=1, packed_factor=factor, **shared)
        layer.register_parameter(WEIGHT, packed)
        scales = solution.scales.to(dtype).contiguous()
        layer.register_parameter(SCALE, GroupQuantScaleParameter(data=scales, **shared))
        if solution.zeros is not None:
            zeros = pack_int32(solution.zeros.T, fmt.bits).T.contiguous()
            points = PackedvLLMParameter(data=zeros, packed_dim=0, packed_factor=factor, **shared)
            layer.register_parameter(ZERO, points)


@register_kernel
class VllmInt8(FromVllm):
    """8-bit weights with 8-bit activations, one scale per token."""

    name: ClassVar[str] = "vllm_int8"

    def takes(self, fmt: Format) -> bool:
        return isinstance(fmt, Integer) and (
            (fmt.activations, fmt.bits, fmt.group_size, fmt.symmetric) == ("int8", 8, -1, True)
        )

    def choose(self, fmt: Integer, rows: int, cols: int, dtype: torch.dtype) -> Any:
        from vllm.model_executor.kernels.linear import init_int8_linear_kernel

        return init_int8_linear_kernel(
            is_channelwise=True,
            is_static_input_scheme=False,
            input_symmetric=True,
            module_name="vllm_compress",
        )

    def register(self, layer: Any, stored: Stored, pad: int, dtype: torch.dtype) -> None:
        assert isinstance(stored.format, Integer)
        solution = padded(stored.format.solution(stored.tensors), pad)
        signed = (solution.codes.short() - 128).to(torch.int8).contiguous()
        layer.register_parameter("weight", Parameter(signed, requires_grad=False))
        scale = Parameter(solution.scales.float().reshape(-1, 1), requires_grad=False)
        layer.register_parameter(SCALE, scale)
        for name in ("input_scale", "input_zero_point", "azp_adj"):
            layer.register_parameter(name, None)


def require_instructions(kernel: Any, dtype: torch.dtype) -> None:
    """vLLM's choosers name kernels that this processor cannot run, or runs wrongly: without VNNI,
    oneDNN's int8 products saturate at 16 bits (seen as a third of the value lost); with AMX others
    are taken, which know 16 bits only. CUTLASS has int8 up to compute capability 9.0, and says so
    with the first request."""
    name = type(kernel).__name__
    if name == "CutlassInt8ScaledMMLinearKernel" and current_platform.has_device_capability(100):
        raise ValueError(f"{name} ends at compute capability 9.0")
    if name == "CPUWNA16LinearKernel" and not hasattr(torch.ops._C, "cpu_gemm_wna16"):
        raise ValueError(f"{name} is not in this build of vLLM, which is for AVX2")
    if name == "CPUInt8ScaledMMLinearKernel" and not torch.cpu._is_vnni_supported():
        raise ValueError(f"{name} needs VNNI to be exact")
    amx = torch.cpu._is_amx_tile_supported()
    if name == "CPUInt8ScaledMMLinearKernel" and amx and dtype == torch.float32:
        raise ValueError(f"{name} takes float32 only where there is no AMX")


def padded(solution: IntegerSolution, rows: int) -> IntegerSolution:
    """With `rows` rows of zero scale below: the logits of vocabulary padding."""
    if not rows:
        return solution
    below = (0, 0, 0, rows)
    zeros = None if solution.zeros is None else pad_with_zeros(solution.zeros, below)
    return IntegerSolution(
        pad_with_zeros(solution.codes, below), pad_with_zeros(solution.scales, below), zeros
    )


def pack_int32(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [n, m] -> int32 [n, ceil(m*bits/32)]: one stream of bits, the first code in the
    lowest of the first word; those of 3, 5 and 6 bits go on in the next where a word ends."""
    count = -(-codes.shape[1] * bits // 32)
    groups = pad_with_zeros(codes, (0, -codes.shape[1] % 32)).unflatten(1, (-1, 32))
    words = torch.zeros(*groups.shape[:2], bits, dtype=torch.int64, device=codes.device)
    for place, code in enumerate(groups.to(torch.int64).unbind(-1)):
        word, shift = divmod(place * bits, 32)
        words[..., word] |= code << shift & 0xFFFFFFFF
        if shift + bits > 32:
            words[..., word + 1] |= code >> (32 - shift)
    return words.flatten(1)[:, :count].to(torch.int32).contiguous()
