"""compressed-tensors: read in any of its forms, written in those that ours have an equal in."""

from compress_methods.checkpoint.interchange.compressed_tensors import (
    layout,  # noqa: F401  (registers it)
)
