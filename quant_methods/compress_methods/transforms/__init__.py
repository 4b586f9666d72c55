"""Edits of a model before its matrices are packed; each results in a plain model again."""

from compress_methods.transforms import depth, width  # noqa: F401  (registers them)
from compress_methods.transforms.base import TRANSFORMS, Block, Transform, register_transform

__all__ = ["TRANSFORMS", "Block", "Transform", "register_transform"]
