"""kv_cache: scales for an FP8 cache of keys and values, `kv_cache: fp8` in a recipe.

They are the largest values that the text, what is held out of it included, makes of queries, keys
and values in the result's own blocks, see `checkpoint/loading/kv_cache.py`. Each block's go into
the journal with it; when all blocks are done a file of their own takes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from compress_methods.checkpoint.loading.kv_cache import (
    Seen,
    at_attention,
    attention_modules,
    scales_of,
)
from compress_methods.checkpoint.safetensors import Writer
from compress_methods.conversion.journal import Journal
from compress_methods.conversion.part import Planned
from compress_methods.conversion.planning.plan import Shard
from compress_methods.errors import CalibrationError
from compress_methods.formats import TensorSpec
from compress_methods.model.skeleton import Skeleton
from compress_methods.system.processes import Processes

FACT = "kv_cache"
"""Of a block's line in the journal: the largest q, k and v by attention layer."""


def together(found: Iterable[Mapping[str, list[float]]]) -> dict[str, list[float]]:
    """The largest of what several processes saw."""
    most: dict[str, list[float]] = {}
    for mine in found:
        for name, values in mine.items():
            both = zip(values, most.get(name, values), strict=True)
            most[name] = [max(pair) for pair in both]
    return most


@contextmanager
def watched(planned: Planned, processes: Processes) -> Iterator[dict[str, list[float]]]:
    """What attention of the model has while it lasts, filled in at its end, by every process the
    same; nothing where the recipe asks for no scales."""
    found: dict[str, list[float]] = {}
    model = planned.skeleton.model
    if planned.plan.recipe.kv_cache is None:
        yield found
        return
    seen = Seen(model)
    with at_attention(model, seen):
        yield found
    found |= together(processes.gathered(seen.most))


def write_scales(journal: Journal, shard: Shard, skeleton: Skeleton) -> dict[str, Any]:
    """Write the scales of all layers, of what the journal has of them. Returns facts of the
    shard."""
    lines = journal.finished.values()
    most = {name: seen for line in lines for name, seen in line.get(FACT, {}).items()}
    wanted = attention_modules(skeleton)
    lost = next((name for name in wanted if name not in most), None)
    if lost is not None:
        raise CalibrationError(
            f"{shard.name}: no keys and values of {lost} were seen, so its cache has no scales; "
            "leave out kv_cache"
        )
    if not journal.processes.leads:
        return {"modules": {}}
    scales = scales_of({name: most[name] for name in wanted})
    with Writer(
        journal.directory / shard.file, dict.fromkeys(scales, TensorSpec((1,), "float32"))
    ) as writer:
        for name, value in scales.items():
            writer.put(name, torch.tensor([value]))
    return {"modules": {}}
