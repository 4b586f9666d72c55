"""Our CPU product under other people's checkpoints: compressed-tensors, GPTQ and AWQ.

vLLM hands every weight-only integer layer to the first kernel of its table that can implement it.
This one takes 2, 4 and 8 bits with groups of any multiple of 32 columns, or one per row, on CPUs
where the compiled library is there; everything else falls through to vLLM's own. The weights are
repacked once, as format `integer` packs them; values stay what they were:

    value = scale * (code - zero),  zero = 2^(bits - 1) where the checkpoint stores none

So do activations: whoever installs a plugin for other checkpoints must find theirs unchanged.
VLLM_COMPRESS_KERNEL names a faster product (README, "Reference"); with `vllm` this kernel stands
aside. Scales are kept in 16 bits where these hold them, else as they are.
"""

from __future__ import annotations

import os
from functools import lru_cache
from logging import getLogger
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import (
    MPLinearKernel,
    MPLinearLayerConfig,
)
from vllm.platforms import current_platform
from vllm.scalar_type import ScalarType, scalar_types

from compress_methods.errors import CheckpointError, FormatError
from compress_methods.formats import Stored
from compress_methods.formats.encoding.grouped import SCALES
from compress_methods.formats.integer import Integer, IntegerSolution
from compress_methods.kernels import Want
from compress_methods.kernels.cpu.library import library
from vllm_compress.kernels import runtime
from vllm_compress.kernels.ops import forced_kernel, product_of
from vllm_compress.kernels.worker import prepare_worker

logger = getLogger("vllm.vllm_compress")
BITS: dict[ScalarType, int] = {
    scalar_types.uint2b2: 2,
    scalar_types.uint4b8: 4,
    scalar_types.uint8b128: 8,
    scalar_types.uint2: 2,
    scalar_types.uint4: 4,
    scalar_types.uint8: 8,
}
GROUPS = (128, 64, 32)
EXACT = "cpu_exact"


class CompressLinearKernel(MPLinearKernel):
    """Entered in vLLM's table by `vllm_compress.kernels.third_party`."""

    @classmethod
    def get_min_capability(cls) -> int:
        return -1

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
        if not current_platform.is_cpu():
            return False, "it is for CPUs"
        if forced_kernel() == "vllm":
            return False, "VLLM_COMPRESS_KERNEL=vllm"
        require_whole_groups(c)
        try:
            fmt = format_of(c, torch.bfloat16)
            cols, rows = c.partition_weight_shape
            fmt.check_shape(rows, cols)
        except FormatError as problem:
            return False, str(problem)
        if library() is None:
            return False, "its library could not be compiled"
        return True, None

    def process_weights_after_loading(self, layer: Any) -> None:
        prepare_worker()
        names = [self.w_q_name, self.w_s_name]
        scales = by_output(getattr(layer, self.w_s_name))
        fmt = format_of(self.config, scale_dtype(scales))
        cols, rows = self.config.partition_weight_shape
        repeat = 1 if fmt.group_size < 0 else self.config.group_size // fmt.group_size
        codes = unpack(by_output(getattr(layer, self.w_q_name)), self._bits)
        zeros = None
        if self.w_zp_name is not None:
            names.append(self.w_zp_name)
            if self.config.zero_points:
                stored = by_output(getattr(layer, self.w_zp_name))
                zeros = unpack(stored.T, self._bits).T.repeat_interleave(repeat, 1)
        scales = scales.repeat_interleave(repeat, 1)
        tensors = fmt.pack(IntegerSolution(codes, scales, zeros))
        if not torch.equal(tensors[SCALES].to(scales.dtype), scales):
            tensors[SCALES] = scales.contiguous()
        prepared = runtime.prepare([Stored.whole(fmt, tensors, (rows, cols))], Want(kernel=EXACT))
        self.product = product_of(prepared)
        present = [name for name in names if getattr(layer, name, None) is not None]
        runtime.remove(layer, present)
        self.names = runtime.install(layer, prepared)
        _say_once(fmt.describe(), prepared.kernel)

    def apply_weights(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.product(x, [getattr(layer, name) for name in self.names], bias)

    @property
    def _bits(self) -> int:
        return BITS[self.config.weight_type]


def require_whole_groups(c: MPLinearLayerConfig) -> None:
    """`CheckpointError` where a rank would get a part of a group: its columns would be multiplied
    with another group's scale, by vLLM's kernels, too."""
    (whole, rows), (cols, _) = c.full_weight_shape, c.partition_weight_shape
    if c.group_size > 0 and cols < whole and cols % c.group_size:
        ranks = whole // cols
        raise CheckpointError(
            f"a matrix [{rows}, {whole}] in groups of {c.group_size} columns over {ranks} ranks: "
            f"{cols} columns each would cut a group; use a smaller tensor-parallel size, or "
            f"`vllm-compress import --tensor-parallel-size {ranks}`"
        )


def format_of(c: MPLinearLayerConfig, scales: torch.dtype) -> Integer:
    """The format that holds the same values; `FormatError` where there is none."""
    bits = BITS.get(c.weight_type)
    if bits is None or c.weight_type.has_bias() == c.zero_points:
        raise FormatError(f"weights are {c.weight_type}")
    group = next((g for g in GROUPS if c.group_size > 0 and c.group_size % g == 0), c.group_size)
    name = str(scales).removeprefix("torch.")
    return Integer(bits, group, symmetric=not c.zero_points, scale_dtype=name)


def by_output(parameter: Any) -> Tensor:
    """The parameter with its output dimension first."""
    return parameter.data if parameter.output_dim == 0 else parameter.data.T


def unpack(words: Tensor, bits: int) -> Tensor:
    """int32 [n, m*bits/32], lowest bits first -> uint8 codes [n, m]."""
    stored = words.contiguous().view(torch.uint8)
    lanes = [(stored >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    return torch.stack(lanes, -1).reshape(len(words), -1)


def scale_dtype(scales: Tensor) -> torch.dtype:
    """The 16 bits that hold them exactly, bfloat16 if none does."""
    half = scales.half()
    exact = scales.dtype == torch.float16 or bool((half.to(scales.dtype) == scales).all())
    return torch.float16 if exact and scales.dtype != torch.bfloat16 else torch.bfloat16


@lru_cache
def _say_once(kind: str, kernel: str) -> None:
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        logger.info(
            "vllm-compress multiplies the %s weights of this checkpoint (kernel %s; "
            "VLLM_COMPRESS_KERNEL=cpu_exact for exact activations, =cpu for faster int8 ones, "
            "=vllm for vLLM's own kernel)",
            kind,
            kernel,
        )
