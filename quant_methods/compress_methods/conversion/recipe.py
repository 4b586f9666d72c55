"""The recipe: one YAML file that says what becomes of which modules.

    formats:
      w4: {format: integer, bits: 4, group_size: 128, symmetric: true}
    modules:
      - match: blocks
        format: w4
        algorithm: {algorithm: gptq, damping: 0.01}
    calibration: {samples: 64, length: 512, seed: 0, held_out: 8}

`match` is `blocks` (every linear layer inside the decoder blocks, routers excepted), `embedding`
(the token table), `lm_head`, an exact Hugging Face module name, `re:` and a regular expression that
matches the whole name, or a list of these. The first rule that matches wins; modules no rule
matches are kept as they are. `algorithm` is a name or a mapping with its parameters. `split: error`
divides the bytes of a sparse format among layers; see `split.py`. `pack_zeros`, instead of or
beside `formats` and `modules`, takes what `match` takes: modules that have zeros already, for
`zeros.py` to pack without loss. A recipe of several stages holds `formats` and `modules` in its
last one; see `chain.py`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from compress_methods.algorithms import ALGORITHMS, Algorithm
from compress_methods.conversion.calibration import CalibrationSettings
from compress_methods.conversion.names import matches, recipe_names
from compress_methods.errors import FormatError, RecipeError, nearest
from compress_methods.formats import Format, format_from_dict
from compress_methods.formats.sparse import Sparse
from compress_methods.registry import build_dataclass
from compress_methods.resources import config_path
from compress_methods.yaml_file import read_yaml

KEYS = ("formats", "modules", "calibration", "pack_zeros")
MODULE_KEYS = ("match", "format", "algorithm", "split")
DEFAULT_ALGORITHM = "rtn"
SPLIT = "error"


@dataclass(frozen=True)
class ModuleRule:
    """One entry of `modules`."""

    match: tuple[str, ...]
    format: str
    algorithm: Algorithm
    split: bool = False

    def matches(self, module: str, kind: str) -> bool:
        """`kind` is `blocks`, `embedding`, `lm_head` or empty, as `Skeleton.kind` gives it."""
        return matches(self.match, module, kind)


@dataclass(frozen=True)
class Recipe:
    """A validated recipe. `sha256` identifies its meaning, not its comments."""

    name: str
    formats: dict[str, Format]
    modules: tuple[ModuleRule, ...]
    calibration: CalibrationSettings
    pack_zeros: tuple[str, ...] = ()
    unfit: Mapping[str, str] = field(default_factory=dict)
    """Modules that `pack_zeros` named, with the reason why they stay dense."""

    @property
    def needs_calibration(self) -> bool:
        return any(rule.algorithm.needs != "nothing" for rule in self.modules)

    def to_dict(self) -> dict[str, Any]:
        block = {
            "formats": {name: fmt.to_dict() for name, fmt in self.formats.items()},
            "modules": [
                {
                    "match": list(rule.match),
                    "format": rule.format,
                    "algorithm": {
                        "algorithm": rule.algorithm.name,
                        **dataclasses.asdict(rule.algorithm),
                    },
                    **({"split": SPLIT} if rule.split else {}),
                }
                for rule in self.modules
            ],
            "calibration": dataclasses.asdict(self.calibration),
        }
        return {**block, "pack_zeros": list(self.pack_zeros)} if self.pack_zeros else block

    @property
    def sha256(self) -> str:
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()


def load_recipe(recipe: str | Path | Mapping[str, Any] | Recipe) -> Recipe:
    """A recipe by shipped name, from a YAML file, or from a mapping; raises `RecipeError`."""
    if isinstance(recipe, Recipe):
        return recipe
    return parse_recipe(*read_recipe(recipe))


def read_recipe(recipe: str | Path | Mapping[str, Any]) -> tuple[Any, str, str]:
    """What a recipe holds, where it is for error messages, and its name; raises `RecipeError`."""
    if isinstance(recipe, Mapping):
        return recipe, "recipe", "custom"
    path = Path(recipe)
    if not path.exists() and str(recipe) in recipe_names():
        path = config_path("recipes", f"{recipe}.yaml")
    if not path.is_file():
        raise RecipeError(
            f"recipe {str(recipe)!r}: neither a file nor a recipe name; "
            f"{nearest(str(recipe), recipe_names())}"
        )
    return read_yaml(path, RecipeError), str(path), path.stem


def parse_recipe(block: Any, where: str, name: str) -> Recipe:
    """Validate a recipe's mapping; errors name `where` and the key."""
    if not isinstance(block, Mapping):
        raise RecipeError(f"{where}: expected a mapping, found {type(block).__name__}")
    known_keys(block, KEYS, where)
    packed = _patterns(block["pack_zeros"], f"{where}: pack_zeros") if "pack_zeros" in block else ()
    if packed and not ("formats" in block or "modules" in block):
        return Recipe(name, {}, (), parse_calibration(block, where), packed)
    formats_block = block.get("formats")
    if not isinstance(formats_block, Mapping) or not formats_block:
        raise RecipeError(f"{where}: formats is {formats_block!r}, expected a non-empty mapping")
    try:
        formats = {
            str(key): format_from_dict(spec, f"{where}: formats.{key}")
            for key, spec in formats_block.items()
        }
    except FormatError as problem:
        raise RecipeError(str(problem)) from problem
    modules = block.get("modules")
    if not isinstance(modules, list) or not modules:
        raise RecipeError(f"{where}: modules is {modules!r}, expected a non-empty list")
    rules = tuple(
        _rule(entry, formats, f"{where}: modules[{i}]") for i, entry in enumerate(modules)
    )
    return Recipe(name, formats, rules, parse_calibration(block, where), packed)


def parse_calibration(block: Mapping[str, Any], where: str) -> CalibrationSettings:
    """The `calibration:` of a recipe's mapping; raises `RecipeError`."""
    return cast(
        CalibrationSettings,
        build_dataclass(
            CalibrationSettings,
            block.get("calibration") or {},
            f"{where}: calibration",
            RecipeError,
        ),
    )


def _rule(entry: Any, formats: Mapping[str, Format], where: str) -> ModuleRule:
    if not isinstance(entry, Mapping):
        raise RecipeError(f"{where}: expected a mapping, found {entry!r}")
    known_keys(entry, MODULE_KEYS, where)
    patterns = _patterns(entry.get("match"), f"{where}: match")
    name = str(entry.get("format"))
    if name not in formats:
        raise RecipeError(f"{where}: unknown format {name!r}; {nearest(name, formats)}")
    spec = entry.get("algorithm", DEFAULT_ALGORITHM)
    if isinstance(spec, str):
        spec = {"algorithm": spec}
    algorithm = ALGORITHMS.build(spec, "algorithm", where, RecipeError)
    try:
        algorithm.check_format(formats[name])
    except RecipeError as problem:
        raise RecipeError(f"{where}: {problem}") from problem
    split = entry.get("split")
    if split not in (None, SPLIT):
        raise RecipeError(f"{where}: split is {split!r}, expected {SPLIT}")
    if split and not (isinstance(formats[name], Sparse) and algorithm.needs != "nothing"):
        raise RecipeError(
            f"{where}: split: {SPLIT} chooses n of a sparse format by what calibration shows; "
            f"found format {formats[name].name!r} and algorithm {algorithm.name!r}"
        )
    return ModuleRule(patterns, name, algorithm, split is not None)


def known_keys(block: Mapping[str, Any], keys: tuple[str, ...], where: str) -> None:
    """`RecipeError` that names the nearest key for one that is not among `keys`."""
    for key in block:
        if key not in keys:
            raise RecipeError(f"{where}: unknown key {key!r}; {nearest(str(key), keys)}")


def _patterns(match: Any, where: str) -> tuple[str, ...]:
    """What `match` holds: a text or a list of texts."""
    patterns = tuple(match) if isinstance(match, list) else (match,)
    if not patterns or not all(isinstance(p, str) and p for p in patterns):
        raise RecipeError(f"{where} is {match!r}, expected a text or a list of texts")
    for pattern in patterns:
        try:
            re.compile(pattern.removeprefix("re:"))
        except re.error as problem:
            raise RecipeError(f"{where} {pattern!r}: {problem}") from problem
    return patterns
