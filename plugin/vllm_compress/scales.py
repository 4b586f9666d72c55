"""One set of codes with scales of another task: a way of loading for vLLM.

    vllm serve out/int2 --load-format vllm_compress \\
        --model-loader-extra-config '{"scales": "task"}'

The files are those of `out/int2`; tensors that `task` has (`split-scales`) come from there instead.
So one directory of codes on disk, and in the page cache, serves any number of tasks.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from compress_methods.errors import CompressError
from vllm_compress.names import QUANT_METHOD

SCALES = "scales"


class ScalesLoader(DefaultModelLoader):
    """vLLM's own, with some tensors from elsewhere."""

    def __init__(self, load_config: Any) -> None:
        plain = copy.copy(load_config)
        extra = dict(load_config.model_loader_extra_config or {})
        self.scales = extra.pop(SCALES, None)
        if not isinstance(self.scales, str):
            raise CompressError(
                f"--load-format {QUANT_METHOD}: scales is {self.scales!r}, expected "
                """--model-loader-extra-config '{"scales": "DIR"}'"""
            )
        plain.load_format, plain.model_loader_extra_config = "safetensors", extra
        super().__init__(plain)

    def _get_weights_iterator(self, source: Any) -> Iterator[tuple[str, Any]]:
        from compress_methods.conversion.exchange.scales import read_scales

        left = read_scales(self.scales, source.model_or_path)
        for name, tensor in super()._get_weights_iterator(source):
            yield name, left.pop(name.removeprefix(source.prefix), tensor)


def register_loader() -> None:
    """Make vLLM know the load format."""
    register_model_loader(QUANT_METHOD)(ScalesLoader)
