"""How compressed matrices are multiplied: one open table, the highest rank wins."""

from compress_methods.kernels import (  # noqa: F401  (registers them)
    composite,
    in_triton,
    reference,
    tensor_train,
    torch_cpu,
)
from compress_methods.kernels.base import (
    KERNELS,
    Kernel,
    Operator,
    Prepared,
    Want,
    rebuild,
    register_kernel,
)
from compress_methods.kernels.cpu import gemm  # noqa: F401  (registers ours)
from compress_methods.kernels.dispatch import choose, embed, kernel, matmul, prepare, side_by_side
from compress_methods.kernels.wrappers import (  # noqa: F401  (registers them)
    lowrank,
    padded,
    reordered,
    rotated,
    shifted,
)

__all__ = [
    "KERNELS",
    "Kernel",
    "Operator",
    "Prepared",
    "Want",
    "choose",
    "embed",
    "kernel",
    "matmul",
    "prepare",
    "rebuild",
    "register_kernel",
    "side_by_side",
]
