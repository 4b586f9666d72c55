"""How compressed matrices lie in checkpoints: our own layout and other tools'."""

from compress_methods.checkpoint.interchange import own  # noqa: F401  (registers it)
from compress_methods.checkpoint.interchange.base import (
    LAYOUTS,
    DecodedEntry,
    Layout,
    decoded_entries,
    register_layout,
)

__all__ = ["LAYOUTS", "DecodedEntry", "Layout", "decoded_entries", "register_layout"]
