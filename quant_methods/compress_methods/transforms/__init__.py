"""Changes of a model before its matrices are packed, one file per pass."""

from compress_methods.transforms import (  # noqa: F401  (registers them)
    awq,
    depth,
    experts,
    fresh,
    rotation,
    sharing,
    smoothquant,
    width,
)
from compress_methods.transforms.base import TRANSFORMS, Outline, Part, Pass, register_transform

__all__ = ["TRANSFORMS", "Outline", "Part", "Pass", "register_transform"]
