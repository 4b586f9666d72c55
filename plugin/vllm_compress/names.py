"""Names that other programs know this one by: in checkpoints and in the environment.

Importing this module loads nothing, so that the command line and vLLM's processes may do it early.
"""

from __future__ import annotations

from compress_methods.names import CACHE_VARIABLE as CACHE_VARIABLE
from compress_methods.names import ISA_VARIABLE as ISA_VARIABLE
from compress_methods.names import QUANT_METHOD as QUANT_METHOD

DEPLOYMENT_VARIABLE = "VLLM_COMPRESS_DEPLOYMENT"
KERNEL_VARIABLE = "VLLM_COMPRESS_KERNEL"
THIRD_PARTY_VARIABLE = "VLLM_COMPRESS_FOREIGN"
# All that a user or one of our processes may set. The kernel's choice reaches the compile cache's
# key by another one, VLLM_COMPRESS_FINGERPRINT, see `kernels.ops`.
VARIABLES = (
    DEPLOYMENT_VARIABLE,
    KERNEL_VARIABLE,
    CACHE_VARIABLE,
    THIRD_PARTY_VARIABLE,
    ISA_VARIABLE,
)
