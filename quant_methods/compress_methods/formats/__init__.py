"""How a compressed matrix is stored and multiplied: one file per format."""

from compress_methods.formats import dense, integer, sparse  # noqa: F401  (registers them)
from compress_methods.formats.base import (
    FORMATS,
    Axis,
    Format,
    Prepared,
    TensorSpec,
    format_from_dict,
    register_format,
)

__all__ = [
    "FORMATS",
    "Axis",
    "Format",
    "Prepared",
    "TensorSpec",
    "format_from_dict",
    "register_format",
]
