"""GGUF, the files of llama.cpp: container, blocks of quantized values, names, configuration."""

from compress_methods.checkpoint.interchange.gguf import layout  # noqa: F401  (registers it)
from compress_methods.checkpoint.interchange.gguf.entries import gguf_entries

__all__ = ["gguf_entries"]
