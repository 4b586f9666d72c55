"""compress_methods: formats, algorithms and the offline conversion of vllm-compress.

    from compress_methods import convert
    convert("path/to/model", "int4-gptq", "path/to/out")

Needs torch and transformers, never vLLM. Importing it loads neither until something is used. With
it imported, transformers' `from_pretrained` loads compressed directories too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compress_methods.lazy import after_import

if TYPE_CHECKING:
    from compress_methods.api import convert, import_checkpoint, recover
    from compress_methods.checkpoint.loading.model import load_model
    from compress_methods.conversion.exchange.adapter import split_adapter
    from compress_methods.conversion.exchange.scales import split_scales

__version__ = "0.1.0"
__all__ = [
    "__version__",
    "convert",
    "import_checkpoint",
    "load_model",
    "recover",
    "split_adapter",
    "split_scales",
]

_LAZY = {
    "convert": "compress_methods.api",
    "import_checkpoint": "compress_methods.api",
    "load_model": "compress_methods.checkpoint.loading.model",
    "recover": "compress_methods.api",
    "split_adapter": "compress_methods.conversion.exchange.adapter",
    "split_scales": "compress_methods.conversion.exchange.scales",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)


def _register_with_transformers() -> None:
    """Enter the quantizer; a transformers that has none of what it needs stays as it is."""
    from importlib import import_module

    try:
        import_module("compress_methods.checkpoint.loading.from_pretrained").register()
    except (ImportError, AttributeError):
        return


after_import("transformers.quantizers.auto", _register_with_transformers)
