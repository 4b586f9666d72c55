"""Offers our CPU kernel to checkpoints that others have quantized.

vLLM's table of kernels takes seconds to import, which a process that serves a plain model must not
pay for. So the kernel is entered when vLLM meets a quantized checkpoint: it then asks every known
method, ours too, whether to take it over (`CompressConfig.override_quantization_method`), and has
the table loaded. Processes that it starts afterwards learn of it by an environment variable.
"""

from __future__ import annotations

import logging
import os

logger = logging.getLogger("vllm.vllm_compress")
VARIABLE = "VLLM_COMPRESS_FOREIGN"


def offer() -> None:
    """A checkpoint quantized by another method is about to be served. Never raises: without our
    kernel vLLM's own does the work."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or os.environ.get("VLLM_COMPRESS_KERNEL") == "vllm":
        return
    os.environ[VARIABLE] = "1"
    enter_if_offered()


def enter_if_offered() -> None:
    """Also in the processes that one with an offer has started."""
    if os.environ.get(VARIABLE) != "1":
        return
    try:
        enter_kernel()
    except Exception as problem:
        logger.warning(
            "no CPU kernel of vllm-compress for this checkpoint (%s: %s)",
            type(problem).__name__,
            problem,
        )


def enter_kernel() -> None:
    """Put the kernel first in vLLM's table for CPUs. `register_linear_kernel` appends, and there
    vLLM's own int4 kernel would always come before ours. Idempotent."""
    from vllm.model_executor.kernels.linear import _POSSIBLE_KERNELS, register_linear_kernel
    from vllm.platforms import PlatformEnum

    from vllm_compress.kernels.third_party_kernel import CompressLinearKernel

    table = _POSSIBLE_KERNELS[PlatformEnum.CPU]
    if CompressLinearKernel not in table:
        register_linear_kernel(CompressLinearKernel, PlatformEnum.CPU)
        table.insert(0, table.pop())
