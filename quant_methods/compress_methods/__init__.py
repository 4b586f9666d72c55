"""compress_methods: formats, algorithms and the offline conversion of vllm-compress.

    from compress_methods import convert
    convert("path/to/model", "int4-gptq", "path/to/out")

Needs torch and transformers, never vLLM. Importing it loads neither until something is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress_methods.conversion.pipeline import convert
    from compress_methods.loading import load_model

__version__ = "0.1.0"
__all__ = ["__version__", "convert", "load_model"]

_LAZY = {
    "convert": "compress_methods.conversion.pipeline",
    "load_model": "compress_methods.loading",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)
