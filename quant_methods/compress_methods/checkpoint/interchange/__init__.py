"""How compressed matrices lie in checkpoints: our own layout and other tools'."""

from compress_methods.checkpoint.interchange import (  # noqa: F401  (registers them)
    awq,
    bitsandbytes,
    compressed_tensors,
    fp8,
    gguf,
    gptq,
    hqq,
    own,
)
from compress_methods.checkpoint.interchange.base import (
    LAYOUTS,
    DecodedEntry,
    Layout,
    decoded_entries,
    register_layout,
)

__all__ = ["LAYOUTS", "DecodedEntry", "Layout", "decoded_entries", "register_layout"]
