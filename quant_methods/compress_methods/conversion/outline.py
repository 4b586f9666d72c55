"""What a transform will make of a model: config, names, shapes and so bytes, from headers alone.

The shapes are those of the model that transformers builds from the changed config, so nothing says
them twice, and a config that does not load is found before any work. The outline of one stage is
the source of the next, which is how a chain of stages is planned to the last byte.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress_methods.conversion.calibration import CalibrationSettings
from compress_methods.conversion.checkpoint import Source
from compress_methods.conversion.plan import Plan, Unit, make_units
from compress_methods.conversion.recipe import Recipe
from compress_methods.errors import CheckpointError, RecipeError
from compress_methods.safetensors_io import Entry
from compress_methods.skeleton import Skeleton, build_skeleton, checkpoint_names
from compress_methods.transforms import Transform


@dataclass(frozen=True)
class Outline:
    """The result of a transform: `config` is its config.json, `moves` where each tensor goes (None:
    its layer is dropped), `source` its tensors as headers without data."""

    config: dict[str, Any]
    skeleton: Skeleton
    source: Source
    moves: dict[str, str | None]


def outline(
    transform: Transform,
    skeleton: Skeleton,
    source: Source,
    config: Mapping[str, Any],
    kept: Sequence[int] | None = None,
) -> Outline:
    """Apply a transform to headers; `kept` are the layers that stay, the first ones if not known.

    `config` is the contents of config.json. Raises `RecipeError` where model and transform do not
    fit.
    """
    settings = skeleton.model.config
    changes = transform.changes(settings)
    count = len(skeleton.blocks)
    kept = range(transform.layers_left(count)) if kept is None else kept
    if len(kept) < count:
        changes["num_hidden_layers"] = len(kept)
        types = getattr(settings, "layer_types", None)
        if types:
            changes["layer_types"] = [types[i] for i in kept]
    changed = {**config, **changes}
    new = _build(changed, transform.name)
    moves = find_moves(source, skeleton, kept)
    return Outline(changed, new, _shaped(source, new, moves, skeleton), moves)


def _build(config: Mapping[str, Any], name: str) -> Skeleton:
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
    moves: dict[str, str | None] = {}
    for name in source.entries:
        parameter = parameter_of.get(name, name)
        old = skeleton.block_of(parameter)
        if old is None:
            moves[name] = name
            continue
        tail = parameter.removeprefix(f"{skeleton.blocks_name}.{old}")
        moves[name] = None
        if old in place:
            moves[name] = f"{name.removesuffix(f'{old}{tail}')}{place[old]}{tail}"
    return moves


def _shaped(
    source: Source, new: Skeleton, moves: Mapping[str, str | None], old: Skeleton
) -> Source:
    """Headers of the result: dtypes of the source, shapes of the new model."""
    entries: dict[str, Entry] = {
        moved: dataclasses.replace(source.entries[name], name=moved)
        for name, moved in moves.items()
        if moved is not None
    }
    names = checkpoint_names(new, entries)
    for parameter, shape in new.parameter_names().items():
        if parameter not in names:
            raise RecipeError(f"{parameter} would be missing after pruning")
        entry = entries[names[parameter]]
        size = math.prod(shape) * entry.dtype.itemsize
        entries[entry.name] = dataclasses.replace(entry, shape=tuple(shape), nbytes=size)
    _require_alike(source, old)
    return dataclasses.replace(source, entries=entries, names=names)


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


def transform_plan(
    transform: Transform,
    calibration: CalibrationSettings,
    skeleton: Skeleton,
    source: Source,
    made: Outline,
    scores: Sequence[float] = (),
) -> Plan:
    """A transform's plan in the form of the packing's: units of tensors to copy, none to compress.

    Units are those of the result; their copies are names of the source.
    """
    dropped = {old: "not part of the model" for old, new in made.moves.items() if new is None}
    units: list[Unit] = []
    blocks = 0
    for unit in make_units({}, skeleton, source):
        if unit.block is None or unit.block < 0:
            units.append(unit)
        elif made.moves[unit.copies[0]] is not None:
            units.append(Unit(f"block-{blocks:05d}", blocks, (), unit.copies))
            blocks += 1
        else:
            score = f", influence {scores[unit.block]:.4f}" if scores else ""
            reason = f"layer {unit.block} dropped by {transform.name}{score}"
            dropped |= dict.fromkeys(unit.copies, reason)
    return Plan(
        Recipe(transform.name, {}, (), calibration),
        tuple(units),
        dropped,
        source.nbytes,
        made.source.nbytes,
        skeleton.tied,
        skeleton.embedding,
        tuple(skeleton.targets),
        {old: new for old, new in made.moves.items() if new is not None and new != old},
    )
