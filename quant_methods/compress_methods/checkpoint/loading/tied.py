"""Heads that config.json says are tied to the embedding, but that are stored with other values;
poolers that transformers' class has, but that are not stored.

transformers and vLLM use the stored head then, so such a model counts as one that ties nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from compress_methods.checkpoint.safetensors import Entry
from compress_methods.checkpoint.source import Source, read_any
from compress_methods.errors import CheckpointError
from compress_methods.model.skeleton import Skeleton, build_skeleton

KEY = "tie_word_embeddings"
POOLER = "pooler"


def open_skeleton(directory: Path, allow_pickle: bool = False) -> Skeleton:
    """The skeleton of a checkpoint, its head tied only if the files agree; `CheckpointError`."""
    skeleton = build_skeleton(directory)
    if skeleton.gives_states and getattr(skeleton.model, POOLER, None) is not None:
        skeleton = _without_pooler(skeleton, directory, allow_pickle)
    if skeleton.tied and _stored_apart(skeleton, directory, allow_pickle):
        return build_skeleton(directory, tied=False)
    return skeleton


def _without_pooler(skeleton: Skeleton, directory: Path, allow_pickle: bool) -> Skeleton:
    """An encoder that is saved without the layer after the first token's state has none."""
    try:
        names = read_any(directory, allow_pickle)
    except CheckpointError:
        return skeleton
    if any(f".{name}".find(f".{POOLER}.") >= 0 for name in names):
        return skeleton
    skeleton.model.pooler = None
    return Skeleton(skeleton.model, skeleton.architecture)


def untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a model whose head is its own, whatever it said."""
    changed = {**config, KEY: False}
    if isinstance(config.get("text_config"), Mapping):
        changed["text_config"] = {**config["text_config"], KEY: False}
    return changed


def untie(directory: Path, skeleton: Skeleton, source: Source) -> tuple[Skeleton, Source]:
    """Model and checkpoint as if the head were stored beside the embedding it is tied to."""
    apart = build_skeleton(directory, tied=False)
    head, table = f"{skeleton.head}.weight", f"{skeleton.tied[skeleton.head]}.weight"
    held = source.entries.get(head)
    entry = held or dataclasses.replace(source.entry(table), name=head)
    return apart, dataclasses.replace(
        source,
        entries={**source.entries, head: entry},
        names={**source.names, head: head},
        views=source.views if held else source.views | {head},
    )


def _stored_apart(skeleton: Skeleton, directory: Path, allow_pickle: bool) -> bool:
    """Whether the checkpoint has a head with other values than the embedding's."""
    try:
        entries = read_any(directory, allow_pickle)
    except CheckpointError:
        return False  # whoever opens the tensors says what is wrong with them
    head = _find(entries, skeleton, f"{skeleton.head}.weight")
    table = _find(entries, skeleton, f"{skeleton.embedding}.weight")
    if head is None or table is None:
        return False
    if (head.shape, head.dtype) != (table.shape, table.dtype):
        return True
    pairs = zip(head.slabs(), table.slabs(), strict=True)
    return not all(torch.equal(mine, theirs) for (_, mine), (_, theirs) in pairs)


def _find(entries: Mapping[str, Entry], skeleton: Skeleton, name: str) -> Entry | None:
    prefix = f"{skeleton.model.base_model_prefix}."
    stored = skeleton.stored_names.of(name)
    names = (name, stored, name.removeprefix(prefix), prefix + name)
    return next((entries[each] for each in names if each in entries), None)
