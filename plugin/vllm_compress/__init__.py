"""vllm-compress inside vLLM: serves checkpoints whose quant_method is `vllm_compress`.

vLLM calls `register` in every process through the entry point `vllm.general_plugins`, also when it
serves some other model. So importing this package loads nothing, and `register` never raises: a
broken installation costs one warning, and only compressed models then fail to load.
"""

from __future__ import annotations

import logging

logger = logging.getLogger("vllm.vllm_compress")


def register() -> None:
    """Make vLLM know the quantization method; may be called any number of times."""
    try:
        from vllm_compress.config import register_config
        from vllm_compress.kernels.third_party import enter_if_offered
        from vllm_compress.metrics.deployment import declare_environment
        from vllm_compress.model_classes import register_classes
        from vllm_compress.scales import register_loader
        from vllm_compress.shutdown import reject_by_error

        declare_environment()
        register_config()
        register_classes()
        register_loader()
        enter_if_offered()
        reject_by_error()
    except Exception as problem:
        logger.warning(
            "vllm-compress is not available, compressed models will not load (%s: %s)",
            type(problem).__name__,
            problem,
        )
