"""What a worker on CPUs needs around our products.

AMX: vLLM's attention uses it in 16 bits, but only oneDNN's products ask Linux for it, so a model
whose products are all ours would end with an illegal instruction.

Norms: vLLM has RMSNorm in C++, but takes it on GPUs only and runs a dozen torch operations on CPUs.
torch.compile fuses these. In eager mode they are the largest part of a token after our products
(`python -m tests.benchmarks profile`), so the C++ ones are entered as implementations of vLLM's
operations `rms_norm` and `fused_add_rms_norm`, and come first until the worker ends.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

PROVIDER = "vllm_compress"


def prepare_worker() -> None:
    """A layer of ours is made in this process."""
    from vllm.config import CompilationMode, get_current_vllm_config_or_none
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    permit_amx()
    config = get_current_vllm_config_or_none()
    if config is not None and config.compilation_config.mode == CompilationMode.NONE:
        use_compiled_norms()


@cache
def permit_amx() -> None:
    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()


def use_compiled_norms() -> None:
    """Put vLLM's C++ norms first; a worker that is started later begins with vLLM's own order.

    Not where they cut bits off: on novels-8m that doubled what bfloat16 costs.
    """
    from vllm import ir

    register_norms()
    if not norms_round():
        return
    for op in (ir.ops.rms_norm, ir.ops.fused_add_rms_norm):
        if PROVIDER not in op.get_priority():
            op.set_default([PROVIDER, *op.get_priority()])


@cache
def norms_round() -> bool:
    """Whether vLLM's C++ norms round bfloat16 to nearest; without AVX-512 they cut bits off."""
    x = torch.ones(1, 16, dtype=torch.bfloat16)
    residual = torch.full_like(x, 1.5 * 2**-8)
    nearest = x + residual
    torch.ops._C.fused_add_rms_norm(x, residual, torch.ones_like(x[0]), 1e-5)
    return torch.equal(residual, nearest)


@cache
def register_norms() -> None:
    from vllm import ir
    from vllm.platforms import current_platform

    current_platform.import_kernels()

    @ir.ops.rms_norm.register_impl(PROVIDER, supports_args=_is_plain)
    def rms_norm(
        x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
    ) -> Tensor:
        out = torch.empty_like(x)
        torch.ops._C.rms_norm(out, x, weight, epsilon)
        return out

    @ir.ops.fused_add_rms_norm.register_impl(PROVIDER, supports_args=_is_plain_sum, inplace=True)
    def fused_add_rms_norm(
        x: Tensor,
        x_residual: Tensor,
        weight: Tensor | None,
        epsilon: float,
        variance_size: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        torch.ops._C.fused_add_rms_norm(x, x_residual, weight, epsilon)
        return x, x_residual


def _is_plain(
    x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> bool:
    """What the C++ norms take: whole rows, one after another, of vectors of 16."""
    return (
        variance_size is None
        and weight is not None
        and weight.dtype == x.dtype
        and x.shape[-1] % 16 == 0
        and x.is_contiguous()
    )


def _is_plain_sum(
    x: Tensor,
    x_residual: Tensor,
    weight: Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> bool:
    return x_residual.is_contiguous() and _is_plain(x, weight, epsilon, variance_size)
