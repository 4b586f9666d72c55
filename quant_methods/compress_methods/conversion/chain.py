"""Recipes of several stages: transforms one after another, and at the end, if wanted, the packing.

    stages:
      - {transform: width, ffn: 25%, attention: 25%}
      - formats: {w4: {format: integer, bits: 4, group_size: 128}}
        modules: [{match: blocks, format: w4, algorithm: gptq}]
    calibration: {samples: 64, length: 512, seed: 0, held_out: 8}
    prune_to: {perplexity_increase: 5%, size: 60%, steps: 20}   # optional; one bound or both

A recipe without `stages` is the packing alone. Where `prune_to` is given, every value written
`search` is set to the same share of what is there (`n` of an n:m sparse format to what then stays),
and the smallest result within the bound is kept; `conversion/search.py` does it. All stages see the
same calibration text, and what a result loses is measured against the original.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compress_methods.conversion.calibration import CalibrationSettings
from compress_methods.conversion.recipe import (
    Recipe,
    known_keys,
    parse_calibration,
    parse_recipe,
    read_recipe,
)
from compress_methods.errors import RecipeError
from compress_methods.registry import build_dataclass
from compress_methods.transforms import TRANSFORMS, Transform

KEYS = ("stages", "calibration", "prune_to")
PACKING_KEYS = ("formats", "modules")
SEARCH = "search"


@dataclass(frozen=True)
class PruneTo:
    """How far to prune: a share that perplexity on held-out text may rise by, or that the bytes
    have to come down to, or both; tried at `steps` levels, evenly between nothing and everything.
    """

    perplexity_increase: float | None = None
    size: float | None = None
    steps: int = 20

    def __post_init__(self) -> None:
        if self.perplexity_increase is None and self.size is None:
            raise RecipeError("expected perplexity_increase, size or both")
        if self.perplexity_increase is not None and self.perplexity_increase <= 0:
            raise RecipeError(f"perplexity_increase is {self.perplexity_increase}, expected more")
        if self.size is not None and not 0 < self.size < 1:
            raise RecipeError(f"size is {self.size}, expected a share between 0 and 1")
        if not 2 <= self.steps <= 1000:
            raise RecipeError(f"steps is {self.steps}, expected a number from 2 to 1000")


@dataclass(frozen=True)
class Chain:
    """A validated recipe of any number of stages. `block` is what it was read from."""

    name: str
    transforms: tuple[Transform, ...]
    packing: Recipe | None
    calibration: CalibrationSettings
    prune_to: PruneTo | None = None
    level: float | None = None
    block: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """The recipe's meaning; without transforms that of the packing alone."""
        if self.prune_to is not None:
            return dict(self.block)
        packing = self.packing.to_dict() if self.packing is not None else {}
        if not self.transforms:
            return packing
        stages = [{"transform": t.name, **dataclasses.asdict(t)} for t in self.transforms]
        if packing:
            stages.append({key: packing[key] for key in PACKING_KEYS})
        return {"stages": stages, "calibration": dataclasses.asdict(self.calibration)}

    @property
    def sha256(self) -> str:
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def at(self, level: float) -> Chain:
        """This recipe with `search` set to a level from 0 (nothing) to 1 (everything)."""
        block = {key: value for key, value in self.block.items() if key != "prune_to"}
        where = f"{self.name}, searched at {level:.1%}"
        chain = _parse(_set_level(block, level), where, self.name)
        return dataclasses.replace(chain, level=level)


def load_chain(recipe: str | Path | Mapping[str, Any] | Recipe | Chain) -> Chain:
    """A recipe of any number of stages by shipped name, from a YAML file or a mapping; raises
    `RecipeError`."""
    if isinstance(recipe, Chain):
        return recipe
    if isinstance(recipe, Recipe):
        return Chain(recipe.name, (), recipe, recipe.calibration)
    return parse_chain(*read_recipe(recipe))


def parse_chain(block: Any, where: str, name: str) -> Chain:
    """Validate a recipe's mapping; errors name `where` and the key."""
    searched = isinstance(block, Mapping) and list(_searched(block))
    if not isinstance(block, Mapping) or not (searched or "prune_to" in block):
        return _parse(block, where, name)
    values = block.get("prune_to")
    if not isinstance(values, Mapping):
        raise RecipeError(
            f"{where}: {searched[0] if searched else 'prune_to'} needs "
            "`prune_to: {perplexity_increase: 5%}` or `{size: 60%}` to say how far"
        )
    if not searched:
        raise RecipeError(
            f"{where}: prune_to is given, but no value is `{SEARCH}`, such as "
            f"`{{transform: depth, drop: {SEARCH}}}`"
        )
    target = build_dataclass(PruneTo, _shares(values), f"{where}: prune_to", RecipeError)
    rest = {key: value for key, value in block.items() if key != "prune_to"}
    chain = _parse(_set_level(rest, 0.5), where, name)
    if not chain.calibration.held_out:
        raise RecipeError(f"{where}: prune_to measures on held-out text; calibration has none")
    return dataclasses.replace(chain, prune_to=target, block=block)


def _parse(block: Any, where: str, name: str) -> Chain:
    if not isinstance(block, Mapping) or "stages" not in block:
        recipe = parse_recipe(block, where, name)
        return Chain(name, (), recipe, recipe.calibration)
    known_keys(block, KEYS, where)
    stages = block["stages"]
    if not isinstance(stages, list) or not stages:
        raise RecipeError(f"{where}: stages is {stages!r}, expected a non-empty list")
    transforms, packing = [], None
    for i, stage in enumerate(stages):
        at = f"{where}: stages[{i}]"
        if packing is not None:
            raise RecipeError(f"{at}: nothing can follow the packing (stages[{i - 1}])")
        if isinstance(stage, Mapping) and "transform" in stage:
            transforms.append(TRANSFORMS.build(_shares(stage), "transform", at, RecipeError))
        elif isinstance(stage, Mapping) and "formats" in stage:
            known_keys(stage, PACKING_KEYS, at)
            shared = {key: block[key] for key in ("calibration",) if key in block}
            packing = parse_recipe({**stage, **shared}, at, name)
        else:
            raise RecipeError(
                f"{at}: expected a transform, or formats and modules; found {stage!r}"
            )
    if not transforms:
        raise RecipeError(f"{where}: stages has only the packing; write formats and modules alone")
    return Chain(name, tuple(transforms), packing, parse_calibration(block, where))


def _shares(values: Mapping[str, Any]) -> dict[str, Any]:
    """The mapping with texts such as `25%` as numbers."""
    return {key: _share(value) for key, value in values.items()}


def _share(value: Any) -> Any:
    if isinstance(value, str) and value.endswith("%"):
        try:
            return float(value[:-1]) / 100
        except ValueError:
            return value
    return value


def _searched(block: Any, path: str = "") -> Iterator[str]:
    """Where `search` stands, such as `stages[0].drop`."""
    if block == SEARCH:
        yield path
    elif isinstance(block, Mapping):
        for key, value in block.items():
            yield from _searched(value, f"{path}.{key}" if path else str(key))
    elif isinstance(block, list):
        for i, value in enumerate(block):
            yield from _searched(value, f"{path}[{i}]")


def _set_level(block: Any, level: float) -> Any:
    if isinstance(block, list):
        return [_set_level(value, level) for value in block]
    if not isinstance(block, Mapping):
        return block
    new = {}
    for key, value in block.items():
        new[key] = level if value == SEARCH else _set_level(value, level)
        if key == "n" and value == SEARCH and isinstance(block.get("m"), int):
            new[key] = min(block["m"] - 1, max(1, round(block["m"] * (1 - level))))
    return new
