"""What `kv_cache: fp8` of a recipe takes of a model: attention that can be seen, and scales."""

from __future__ import annotations

from collections.abc import Iterable

from compress_methods.checkpoint.compressed import KV_SCALES
from compress_methods.checkpoint.interchange.base import Layout
from compress_methods.checkpoint.loading.kv_cache import attention_modules
from compress_methods.errors import RecipeError
from compress_methods.model.skeleton import Skeleton
from compress_methods.names import QUANT_METHOD
from compress_methods.recipe.schema import Recipe

KV_SHARD = "kv_cache"
"""Name of the shard that holds the scales."""
WRITTEN_BY = (QUANT_METHOD, "compressed-tensors")
STALE = "scale of the source's KV cache"


def kv_bytes(recipe: Recipe, skeleton: Skeleton, layout: Layout) -> int:
    """Bytes of the scales, 0 where the recipe asks for none; `RecipeError` where there cannot be
    any."""
    if recipe.kv_cache is None:
        return 0
    modules = attention_modules(skeleton)
    what = f"recipe {recipe.name!r}: kv_cache: {recipe.kv_cache}"
    if not modules:
        kind = type(skeleton.model).__name__
        raise RecipeError(
            f"{what} needs attention with a cache of keys and values, {kind} has none"
        )
    if layout.name not in WRITTEN_BY:
        raise RecipeError(f"{what} has no place in a {layout.name} checkpoint; leave it out")
    return 4 * len(KV_SCALES) * len(modules)


def stale_scales(names: Iterable[str], skeleton: Skeleton) -> list[str]:
    """Tensors of a source that are scales of its own cache, measured on another model than the
    result."""
    known = skeleton.parameter_names()
    return [n for n in names if n.rpartition(".")[2] in KV_SCALES and n not in known]
