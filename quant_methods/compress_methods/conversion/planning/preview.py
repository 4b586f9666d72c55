"""What a pass will make of a model: config, names, shapes and so bytes, from headers alone.

The shapes are those of the model that transformers builds from the changed config, so nothing says
them twice, and a config that does not load is found before any work. The preview of one stage is
the source of the next, which is how a staged recipe is planned to the last byte.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress_methods.calibration.settings import CalibrationSettings
from compress_methods.checkpoint.safetensors import Entry
from compress_methods.checkpoint.source import Source, find_parts
from compress_methods.conversion.planning.plan import Plan, Shard, make_shards
from compress_methods.errors import CheckpointError, RecipeError
from compress_methods.formats import ITEMSIZE
from compress_methods.model.skeleton import Skeleton, build_skeleton, checkpoint_names
from compress_methods.recipe.schema import Recipe
from compress_methods.transforms import Pass


@dataclass(frozen=True)
class Preview:
    """The result of a transform: `config` is its config.json, `moves` where each tensor goes (None:
    its layer is dropped), `source` its tensors as headers without data."""

    config: dict[str, Any]
    skeleton: Skeleton
    source: Source
    moves: dict[str, str | None]


def preview(
    reshaping: Pass,
    skeleton: Skeleton,
    source: Source,
    config: Mapping[str, Any],
    kept: Sequence[int] | None = None,
) -> Preview:
    """Apply a pass to headers; `kept` are the layers that stay, the first ones if not known.

    `config` is the contents of config.json. Raises `RecipeError` where model and pass do not fit.
    """
    settings = skeleton.model.config
    outline = reshaping.plan(skeleton)
    changes = dict(outline.changes)
    count = len(skeleton.blocks)
    left = count if outline.layers is None else outline.layers
    kept = range(left) if kept is None else kept
    if len(kept) < count:
        changes["num_hidden_layers"] = len(kept)
        types = getattr(settings, "layer_types", None)
        if types:
            changes["layer_types"] = [types[i] for i in kept]
    changed = {**config, **changes}
    new = build(changed, reshaping.name)
    moves = find_moves(source, skeleton, kept)
    if outline.experts is None:
        _require_alike(source, skeleton)
    else:
        moves |= dict.fromkeys(_experts_from(outline.experts, skeleton, source))
    return Preview(changed, new, _shaped(source, new, moves), moves)


def _experts_from(first: int, skeleton: Skeleton, source: Source) -> Iterator[str]:
    """Tensors of single experts from a number on; what stays has the numbers before it."""
    for slot in skeleton.slots.values():
        if slot.parameter in source.parts and slot.index[:1] >= (first,):
            yield source.tensor_of(slot)


def build(config: Mapping[str, Any], name: str) -> Skeleton:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        try:
            return build_skeleton(Path(folder))
        except CheckpointError as problem:
            reason = str(problem).partition("build a causal LM from it ")[2]
            raise RecipeError(
                f"{name}: the result would not load in transformers {reason}"
            ) from None


def find_moves(source: Source, skeleton: Skeleton, kept: Sequence[int]) -> dict[str, str | None]:
    """New name of every tensor when only the layers `kept` stay, in their order; None: dropped."""
    place = {old: new for new, old in enumerate(kept)}
    parameter_of = {tensor: parameter for parameter, tensor in source.names.items()}
    blocks = skeleton.blocks_name.rpartition(".")[2]
    moves: dict[str, str | None] = {}
    for name in source.entries:
        parameter = parameter_of.get(name, name)
        old = skeleton.block_of(parameter)
        if old is None:
            moves[name] = name
            continue
        moves[name] = None
        if old in place:  # names of tensors may differ from the model's but for their block
            moves[name] = re.sub(rf"(?<={blocks}\.){old}(?=\.)", str(place[old]), name, count=1)
    return moves


def _shaped(source: Source, new: Skeleton, moves: Mapping[str, str | None]) -> Source:
    """Headers of the result: dtypes of the source, shapes of the new model."""
    entries: dict[str, Entry] = {
        moved: dataclasses.replace(source.entries[name], name=moved)
        for name, moved in moves.items()
        if moved is not None
    }
    names = checkpoint_names(new, entries)
    parts = find_parts(new, entries, names)
    for parameter, shape in new.parameter_names().items():
        if parameter in parts:
            continue
        if parameter not in names:
            raise RecipeError(f"{parameter} would be missing after pruning")
        entry = entries[names[parameter]]
        size = math.prod(shape) * ITEMSIZE[entry.dtype]
        entries[entry.name] = dataclasses.replace(entry, shape=tuple(shape), nbytes=size)
    return dataclasses.replace(source, entries=entries, names=names, parts=parts, views=frozenset())


def _require_alike(source: Source, skeleton: Skeleton) -> None:
    """`RecipeError` unless all blocks hold the same: else bytes depend on which are dropped."""
    blocks: dict[int, set[Any]] = {}
    for parameter, name in source.names.items():
        index = skeleton.block_of(parameter)
        if index is not None:
            tail = parameter.removeprefix(f"{skeleton.blocks_name}.{index}")
            entry = source.entries[name]
            blocks.setdefault(index, set()).add((tail, entry.shape, entry.dtype))
    odd = next((i for i, held in blocks.items() if held != blocks[0]), None)
    if odd is not None:
        raise RecipeError(
            f"{skeleton.blocks_name}.{odd} differs from layer 0 in shapes or dtypes; "
            "pruning needs layers that are alike"
        )


def preview_plan(
    reshaping: Pass,
    calibration: CalibrationSettings,
    skeleton: Skeleton,
    source: Source,
    made: Preview,
    scores: Sequence[float] = (),
) -> Plan:
    """A pass's plan in the form of the packing's: shards of tensors to copy, none to compress.

    Shards are those of the result; their copies are names of the source.
    """
    why = "not part of the model"
    if len(made.skeleton.blocks) == len(skeleton.blocks):
        why = f"one of the experts that {reshaping.name} leaves out"
    dropped = {old: why for old, new in made.moves.items() if new is None}
    shards: list[Shard] = []
    blocks = 0
    for shard in make_shards({}, skeleton, source):
        if shard.block is None or shard.block < 0:
            shards.append(shard)
        elif any(made.moves[name] is not None for name in shard.copies):
            stay = tuple(name for name in shard.copies if made.moves[name] is not None)
            shards.append(Shard(f"block-{blocks:05d}", blocks, (), stay))
            blocks += 1
        else:
            score = f", influence {scores[shard.block]:.4f}" if scores else ""
            reason = f"layer {shard.block} dropped by {reshaping.name}{score}"
            dropped |= dict.fromkeys(shard.copies, reason)
    return Plan(
        Recipe(reshaping.name, {}, (), calibration),
        tuple(shards),
        dropped,
        source.nbytes,
        made.source.nbytes,
        skeleton.tied,
        skeleton.embedding,
        tuple(skeleton.slots),
        {old: new for old, new in made.moves.items() if new is not None and new != old},
    )
