"""How a compressed matrix is stored: one file per format. Needs no torch until one is packed."""

from compress_methods.formats import (  # noqa: F401  (registers them)
    dense,
    floats,
    integer,
    lookup,
    sparse,
    tensor_train,
    trellis,
)
from compress_methods.formats.base import (
    FORMATS,
    ITEMSIZE,
    MAIN_TENSOR,
    Axis,
    Format,
    TensorSpec,
    count_not_finite,
    dtype_name,
    format_from_dict,
    register_format,
    torch_dtype,
)
from compress_methods.formats.rounder import Grid, Rounder
from compress_methods.formats.stored import Stored
from compress_methods.formats.wrappers import (  # noqa: F401  (registers them)
    lowrank,
    padded,
    reordered,
    rotated,
    shifted,
)

__all__ = [
    "FORMATS",
    "ITEMSIZE",
    "MAIN_TENSOR",
    "Axis",
    "Format",
    "Grid",
    "Rounder",
    "Stored",
    "TensorSpec",
    "count_not_finite",
    "dtype_name",
    "format_from_dict",
    "register_format",
    "torch_dtype",
]
