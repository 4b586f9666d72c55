"""KeptScales: an attention layer's scales for a cache in FP8, of a recipe with `kv_cache: fp8`.

vLLM's own method does the work: it loads `k_scale`, `v_scale` and `q_scale`, and lets go of them
where the cache is of another kind. Only `--kv-cache-dtype fp8` makes it one, which not every device
has: the checkpoint declares scales, not a choice. Fails, in one line, where a scale was not loaded:
vLLM would take 1 instead.
"""

from __future__ import annotations

from typing import Any

from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod

from compress_methods.errors import CheckpointError
from vllm_compress.layers.collector import is_dummy

SCALES = ("q_scale", "k_scale", "v_scale")


class KeptScales(BaseKVCacheMethod):
    """`prefix`: the layer's name in the model."""

    def __init__(self, quant_config: Any, prefix: str) -> None:
        super().__init__(quant_config)
        self.prefix = prefix

    def process_weights_after_loading(self, layer: Any) -> None:
        for name in SCALES:
            scale = getattr(layer, name, None)
            if scale is not None and not float(scale) > 0 and not is_dummy():
                raise CheckpointError(
                    f"{self.prefix}.{name}: no tensor of the checkpoint was loaded as it; convert "
                    "again without kv_cache"
                )
        super().process_weights_after_loading(layer)
