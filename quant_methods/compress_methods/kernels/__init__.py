"""The one table of kernels: per format and device, the first entry that takes the matrix wins.

vLLM's own GPU kernels are chosen a level above, in the plugin; what reaches this table runs on
anything torch runs on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from compress_methods.kernels.base import Kernel
from compress_methods.kernels.cpu_gemm import CpuExact, CpuGemm
from compress_methods.kernels.reference import Reference
from compress_methods.kernels.torch_cpu import TorchInt4, TorchInt8

if TYPE_CHECKING:
    from compress_methods.formats.base import Format

KERNELS: dict[str, Kernel] = {
    k.name: k for k in (CpuGemm(), CpuExact(), TorchInt4(), TorchInt8(), Reference())
}


def choose(fmt: Format, rows: int, cols: int, device: torch.device, *, gather: bool) -> Kernel:
    """Fastest kernel for this matrix; `gather` rules out layouts whose rows cannot be looked up."""
    return next(
        k
        for k in KERNELS.values()
        if k.takes_unasked(fmt)
        and (k.gathers or not gather)
        and k.supports(fmt, rows, cols, device)
    )


__all__ = ["KERNELS", "Kernel", "choose"]
