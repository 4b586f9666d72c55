"""Recipes of several stages: transforms one after another, and at the end, if wanted, the packing.

    stages:
      - {transform: width, ffn: 25%, attention: 25%}
      - formats: {w4: {format: integer, bits: 4, group_size: 128}}
        modules: [{match: blocks, format: w4, algorithm: gptq}]
      - {train: scales, loss: kl, steps: 500}                     # optional, anywhere but first
    calibration: {samples: auto, length: 512, seed: 0, held_out: 8}
    prune_to: {perplexity_increase: 5%, size: 60%, steps: 20}   # optional; one bound or more

A recipe without `stages` is the packing alone. Where `prune_to` is given, every value written
`search` is set to the same share of what is there (`n` of an n:m sparse format to what then stays),
and the smallest result within the bound is kept; `search/prune_to.py` does it, also where the
packing has a `budget` of KL. All stages see the same calibration text, and what a result loses is
measured against the original. `accept` and `fallback`, of any recipe, are a gate that its result
has to pass; see `accept.py`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compress_methods.calibration.settings import CalibrationSettings
from compress_methods.errors import RecipeError
from compress_methods.recipe.accept import (
    ACCEPT,
    FALLBACK,
    GATE_KEYS,
    HELD_OUT,
    LEAST_SEQUENCES,
    MOST_FALLBACKS,
    Accept,
    TaskBound,
)
from compress_methods.recipe.budget import Budget
from compress_methods.recipe.schema import (
    Recipe,
    known_keys,
    parse_calibration,
    parse_recipe,
    read_recipe,
)
from compress_methods.recipe.training import TRAIN, Training, parse_training
from compress_methods.registry import build_dataclass
from compress_methods.system.user_file import require_path
from compress_methods.transforms import TRANSFORMS, Pass

KEYS = ("stages", "calibration", "prune_to")
PACKING_KEYS = ("formats", "modules", "budget", "kv_cache")
SEARCH = "search"
BUDGET_STEPS = 64


@dataclass(frozen=True)
class PruneTo:
    """How far to prune: a share that perplexity on held-out text may rise by, nats per token of KL
    to the original there, or a share that the bytes have to come down to, or several of them; tried
    at `steps` levels, evenly between nothing and everything."""

    perplexity_increase: float | None = None
    size: float | None = None
    steps: int = 20
    kl: float | None = None

    def __post_init__(self) -> None:
        if self.size is None and not self.by_text:
            raise RecipeError("expected perplexity_increase, size or both, or kl")
        for key in ("perplexity_increase", "kl"):
            value = getattr(self, key)
            if value is not None and value <= 0:
                raise RecipeError(f"{key} is {value}, expected more")
        if self.size is not None and not 0 < self.size < 1:
            raise RecipeError(f"size is {self.size}, expected a share between 0 and 1")
        if not 2 <= self.steps <= 1000:
            raise RecipeError(f"steps is {self.steps}, expected a number from 2 to 1000")

    @property
    def by_text(self) -> bool:
        """Whether held-out text decides."""
        return self.perplexity_increase is not None or self.kl is not None


@dataclass(frozen=True)
class StagedRecipe:
    """A validated recipe of any number of stages. `block` is what it was read from; `fallback` are
    the recipes to try where the result does not pass `accept`; `training` are `train` stages, each
    with the number of other stages before it."""

    name: str
    transforms: tuple[Pass, ...]
    packing: Recipe | None
    calibration: CalibrationSettings
    prune_to: PruneTo | None = None
    level: float | None = None
    block: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    accept: Accept | None = None
    fallback: tuple[StagedRecipe, ...] = ()
    training: tuple[tuple[int, Training], ...] = ()

    @property
    def segments(self) -> list[StagedRecipe | Training]:
        """Training, and what is converted before it, between and after it, in order."""
        found: list[StagedRecipe | Training] = []
        done, count = 0, len(self.transforms) + (self.packing is not None)
        for until, training in (*self.training, (count, None)):
            if until > done:
                packing = self.packing if until > len(self.transforms) else None
                own = (self.name, self.transforms[done:until], packing, self.calibration)
                found.append(StagedRecipe(*own))
            found += [] if training is None else [training]
            done = until
        return found

    @property
    def starts_anew(self) -> bool:
        """Whether it begins with a student that knows nothing, so that text tells nothing of it."""
        return any(visitor.remakes for visitor in self.transforms)

    @property
    def candidates(self) -> list[StagedRecipe]:
        """What a gate tries, one after another: this recipe without the gate, its fallbacks."""
        return [dataclasses.replace(self, accept=None, fallback=()), *self.fallback]

    def to_dict(self) -> dict[str, Any]:
        """The recipe's meaning; without transforms that of the packing alone."""
        if self.accept is not None:
            first, *others = (one.to_dict() for one in self.candidates)
            return {**first, ACCEPT: self.accept.to_dict(), FALLBACK: others}
        if self.prune_to is not None:
            named = {"calibration": self.calibration.to_dict()} if self.calibration.files else {}
            return {**self.block, **named}
        packing = self.packing.to_dict() if self.packing is not None else {}
        if not self.transforms and not self.training:
            return packing
        stages = [{"transform": t.name, **dataclasses.asdict(t)} for t in self.transforms]
        if packing:
            stages.append({key: packing[key] for key in PACKING_KEYS if key in packing})
        for place, training in reversed(self.training):
            stages.insert(place, training.to_dict())
        return {"stages": stages, "calibration": self.calibration.to_dict()}

    @property
    def sha256(self) -> str:
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    @property
    def search(self) -> PruneTo | None:
        """What a search has to meet, if there is one: `prune_to`, or the KL of a budget."""
        budget = self.packing.budget if self.packing is not None else None
        if self.prune_to is not None or budget is None or budget.kl is None:
            return self.prune_to
        return PruneTo(kl=budget.kl, steps=BUDGET_STEPS)

    def within(self, size: int) -> StagedRecipe:
        """This recipe with a budget of so many bytes."""
        assert self.packing is not None
        packing = dataclasses.replace(self.packing, budget=Budget(size=size))
        return dataclasses.replace(self, packing=packing)

    def at(self, level: float) -> StagedRecipe:
        """This recipe with `search` set to a level from 0 (nothing) to 1 (everything)."""
        block = {key: value for key, value in self.block.items() if key != "prune_to"}
        where = f"{self.name}, searched at {level:.1%}"
        staged = _parse(_set_level(block, level), where, self.name).calibrated(self.calibration)
        return dataclasses.replace(staged, level=level)

    def calibrated(self, settings: CalibrationSettings) -> StagedRecipe:
        """This recipe with other calibration."""
        packing = self.packing and dataclasses.replace(self.packing, calibration=settings)
        return dataclasses.replace(self, packing=packing, calibration=settings)


def load_staged(recipe: str | Path | Mapping[str, Any] | Recipe | StagedRecipe) -> StagedRecipe:
    """A recipe of any number of stages by shipped name, from a YAML file or a mapping; raises
    `RecipeError`."""
    if isinstance(recipe, StagedRecipe):
        return recipe
    if isinstance(recipe, Recipe):
        return StagedRecipe(recipe.name, (), recipe, recipe.calibration)
    block, where, name = read_recipe(recipe)
    folder = Path() if isinstance(recipe, Mapping) else Path(where).parent
    staged = parse_staged(block, where, name, folder)
    settings = staged.calibration.beside(folder)
    others = tuple(one.calibrated(settings) for one in staged.fallback)
    training = tuple((place, one.beside(folder)) for place, one in staged.training)
    staged = dataclasses.replace(staged, fallback=others, training=training)
    return staged.calibrated(settings)


def parse_staged(block: Any, where: str, name: str, folder: Path = Path()) -> StagedRecipe:
    """Validate a recipe's mapping; errors name `where` and the key. `folder` is what paths in it
    are relative to."""
    if not isinstance(block, Mapping) or not any(key in block for key in GATE_KEYS):
        return _parse_searched(block, where, name)
    if block.get(ACCEPT) is None:
        raise RecipeError(f"{where}: fallback needs `accept`, which says when to go on to it")
    accept = _accept(block[ACCEPT], f"{where}: {ACCEPT}", folder)
    rest = {key: value for key, value in block.items() if key not in GATE_KEYS}
    targets = [rest.get("prune_to"), rest.get("budget")]
    by_text = ("perplexity_increase", "kl")
    ways = 1 + any(isinstance(t, Mapping) and any(key in t for key in by_text) for t in targets)
    asked = rest.get("calibration") or {}
    if accept.reads_text and isinstance(asked, Mapping):
        rest["calibration"] = {"held_out": ways * HELD_OUT, **asked}
    staged = _parse_searched(rest, where, name)
    least, found = ways * LEAST_SEQUENCES, staged.calibration.held_out
    if accept.reads_text and found < least:
        raise RecipeError(
            f"{where}: {ACCEPT} judges by {LEAST_SEQUENCES} held-out sequences or more"
            f"{' of either half' if ways > 1 else ''}; calibration.held_out is {found}, "
            f"expected {least} or more"
        )
    fallback = _fallbacks(block, rest, where, folder)
    if any(one.training for one in (staged, *fallback)):
        raise RecipeError(f"{where}: {ACCEPT} cannot judge recipes that train yet")
    return dataclasses.replace(staged, accept=accept, fallback=fallback)


def _accept(values: Any, where: str, folder: Path) -> Accept:
    if not isinstance(values, Mapping):
        raise RecipeError(f"{where} is {values!r:.80}, expected a mapping such as {{kl: 0.01}}")
    found = _shares(values)
    if isinstance(found.get("task"), Mapping):
        at = f"{where}: task"
        task = build_dataclass(TaskBound, _shares(found["task"]), at, RecipeError)
        require_path(folder / task.file, RecipeError, at)
        found["task"] = dataclasses.replace(task, file=str(folder / task.file))
    accept: Accept = build_dataclass(Accept, found, where, RecipeError)
    return accept


def _fallbacks(
    block: Mapping[str, Any], rest: Mapping[str, Any], where: str, folder: Path
) -> tuple[StagedRecipe, ...]:
    specs = block.get(FALLBACK) or []
    if not isinstance(specs, list) or len(specs) > MOST_FALLBACKS:
        raise RecipeError(
            f"{where}: {FALLBACK} is {specs!r:.80}, expected a list of at most {MOST_FALLBACKS}"
        )
    return tuple(
        _fallback(spec, rest.get("calibration"), f"{where}: {FALLBACK}[{i}]", folder)
        for i, spec in enumerate(specs)
    )


def _fallback(spec: Any, calibration: Any, where: str, folder: Path) -> StagedRecipe:
    """A recipe by name, file or mapping, with the calibration of the recipe it stands in for."""
    if not isinstance(spec, str | Mapping):
        raise RecipeError(f"{where} is {spec!r:.80}, expected a recipe's name, file or mapping")
    name = where.rpartition(" ")[2]
    if isinstance(spec, str):
        require_path(folder / spec, RecipeError, where)
        try:
            spec, _, name = read_recipe(folder / spec if (folder / spec).is_file() else spec)
        except RecipeError as problem:
            raise RecipeError(f"{where}: {problem}") from None
    if not isinstance(spec, Mapping):
        raise RecipeError(f"{where}: expected a mapping, found {type(spec).__name__}")
    if any(key in spec for key in GATE_KEYS):
        raise RecipeError(f"{where}: a fallback has no {ACCEPT} or {FALLBACK} of its own")
    block = {key: value for key, value in spec.items() if key != "calibration"}
    if calibration is not None:
        block["calibration"] = calibration
    return _parse_searched(block, where, name)


def _parse_searched(block: Any, where: str, name: str) -> StagedRecipe:
    searched = isinstance(block, Mapping) and list(_searched(block))
    if not isinstance(block, Mapping) or not (searched or "prune_to" in block):
        return _can_search(_parse(block, where, name), "budget.kl", where)
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
    staged = _parse(_set_level(rest, 0.5), where, name)
    if staged.search is not None:
        raise RecipeError(f"{where}: budget.kl and prune_to are two searches, expected one")
    return _can_search(dataclasses.replace(staged, prune_to=target, block=block), "prune_to", where)


def _can_search(staged: StagedRecipe, key: str, where: str) -> StagedRecipe:
    """The recipe; `RecipeError` where there is too little text to search by."""
    if staged.search is not None and staged.training:
        raise RecipeError(f"{where}: {key} cannot search recipes that train yet")
    if staged.search is not None and staged.calibration.held_out < 2:
        raise RecipeError(
            f"{where}: {key} chooses by one half of the held-out text and reports on the other; "
            f"calibration.held_out is {staged.calibration.held_out}, expected 2 or more"
        )
    return staged


def _parse(block: Any, where: str, name: str) -> StagedRecipe:
    if not isinstance(block, Mapping) or "stages" not in block:
        recipe = parse_recipe(block, where, name)
        return StagedRecipe(name, (), recipe, recipe.calibration)
    known_keys(block, (*KEYS, *GATE_KEYS), where)
    stages = block["stages"]
    if not isinstance(stages, list) or not stages:
        raise RecipeError(f"{where}: stages is {stages!r}, expected a non-empty list")
    transforms: list[Pass] = []
    training: list[tuple[int, Training]] = []
    packing = None
    for i, stage in enumerate(stages):
        at = f"{where}: stages[{i}]"
        if isinstance(stage, Mapping) and TRAIN in stage:
            if i == 0:
                raise RecipeError(f"{at}: the original itself has nothing to win back by training")
            done = len(transforms) + (packing is not None)
            training.append((done, parse_training(stage, at)))
        elif packing is not None:
            raise RecipeError(f"{at}: nothing can follow the packing but training")
        elif isinstance(stage, Mapping) and "transform" in stage:
            transforms.append(TRANSFORMS.build(_shares(stage), "transform", at, RecipeError))
        elif isinstance(stage, Mapping) and "formats" in stage:
            known_keys(stage, (*PACKING_KEYS, "on_unfit"), at)
            shared = {key: block[key] for key in ("calibration",) if key in block}
            packing = parse_recipe({**stage, **shared}, at, name)
        else:
            raise RecipeError(
                f"{at}: expected a transform, or formats and modules, or train; found {stage!r}"
            )
    if not transforms and not training:
        raise RecipeError(f"{where}: stages has only the packing; write formats and modules alone")
    trains_next = bool(training) and training[0][0] == 1
    for i, visitor in enumerate(transforms):
        if visitor.remakes and (i or not trains_next):
            raise RecipeError(f"{where}: {visitor.name} comes first, and a train stage behind it")
    calibration = parse_calibration(block, where)
    return StagedRecipe(name, tuple(transforms), packing, calibration, training=tuple(training))


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
