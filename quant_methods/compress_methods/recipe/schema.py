"""The recipe: one YAML file that says what becomes of which modules.

    formats:
      w4: {format: integer, bits: 4, group_size: 128, symmetric: true}
    modules:
      - match: blocks
        format: w4
        algorithm: {algorithm: gptq, damping: 0.01}
    calibration: {samples: auto, length: 512, seed: 0, held_out: 8}

`match` is `blocks` (every linear layer inside the decoder blocks, routers and experts excepted),
`experts` (the matrices of all experts), `embedding` (the token table), `lm_head`, an exact Hugging
Face module name, `re:` and a regular expression that matches the whole name, or a list of these.
The first rule that matches wins; modules no rule matches are kept as they are. `algorithm` is a
name or a mapping with its parameters. `allocate: output_error` divides the bytes of a sparse format
among layers; see `conversion/passes/allocation.py`. A list of formats leaves the choice, for each
group of matrices that vLLM fuses, to what `budget` allows; see `budget.py`. `on_unfit`, of a rule
or of the whole recipe, is for matrices that their format cannot hold or vLLM not serve:
`smaller_group` stores them in the largest half, quarter or eighth of `group_size` that fits and
refuses those with none, `keep` leaves them as they are, `refuse` refuses the recipe. `pack_zeros`,
instead of or beside `formats` and `modules`, takes what `match` takes: modules that have zeros
already, for `conversion/passes/zero_packing.py` to pack without loss. A recipe of several stages
holds `formats` and `modules` in its last one; see `stages.py`. `accept` and `fallback` are in
`accept.py`. `kv_cache: fp8` beside `formats` adds scales for keys and values, which a server takes
that is started with `--kv-cache-dtype fp8`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compress_methods.algorithms import ALGORITHMS, Algorithm
from compress_methods.calibration.settings import CalibrationSettings, parse_settings
from compress_methods.checkpoint.quantization_config import KV_CACHES
from compress_methods.errors import FormatError, RecipeError, nearest
from compress_methods.formats import Format, format_from_dict
from compress_methods.formats.wrappers.padded import padded_formats, unit_of
from compress_methods.formats.wrappers.smaller_group import smaller_groups
from compress_methods.recipe.accept import GATE_KEYS
from compress_methods.recipe.budget import Budget, parse_budget
from compress_methods.recipe.matching import matches, recipe_names
from compress_methods.system.pattern import PatternError, compile_pattern
from compress_methods.system.resources import config_path
from compress_methods.system.user_file import read_yaml, require_path

KEYS = ("formats", "modules", "calibration", "pack_zeros", "on_unfit", "budget", "kv_cache")
MODULE_KEYS = ("match", "format", "algorithm", "allocate", "split", "on_unfit")
ON_UNFIT = ("smaller_group", "pad", "keep", "refuse")
DEFAULT_ALGORITHM = "rtn"
ALLOCATE = "output_error"
OLD_KEY, OLD_VALUE = "split", "error"
"""What recipes called `allocate: output_error` until version 0.1."""


@dataclass(frozen=True)
class ModuleRule:
    """One entry of `modules`; `format` is the first of `candidates`, if there are any."""

    match: tuple[str, ...]
    format: str
    algorithm: Algorithm
    allocate: bool = False
    on_unfit: str = ON_UNFIT[0]
    candidates: tuple[str, ...] = ()

    def choose(
        self, fmt: Format, fits: Callable[[Format], bool], cols: int, ways: int = 1
    ) -> Format | None:
        """The format, or under `on_unfit: smaller_group` the one with the largest group that fits,
        else what is padded for `ways` ranks; under `pad` whatever needs fewest added columns. None
        where there is none. `cols`: of the matrix."""
        may = self.on_unfit in ("smaller_group", "pad") and not self.allocate
        offered = [fmt, *(smaller_groups(fmt) if may else ())]
        whole = [each for each in offered if cols % unit_of(each) == 0]
        if self.on_unfit == "pad":
            whole = list(offered)
            offered += padded_formats(offered, cols)
        if may and ways > 1:
            offered += padded_formats(whole, cols, ways)
        return next((each for each in offered if fits(each)), None)

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
    """Modules that a rule or `pack_zeros` named, with the reason why they stay dense."""
    budget: Budget | None = None
    kv_cache: str | None = None

    @property
    def needs_calibration(self) -> bool:
        return self.kv_cache is not None or any(
            rule.candidates or rule.algorithm.needs(self.formats[rule.format])
            for rule in self.modules
        )

    def to_dict(self) -> dict[str, Any]:
        block = {
            "formats": {name: fmt.to_dict() for name, fmt in self.formats.items()},
            "modules": [
                {
                    "match": list(rule.match),
                    "format": list(rule.candidates) or rule.format,
                    "algorithm": rule.algorithm.to_dict(),
                    **({"allocate": ALLOCATE} if rule.allocate else {}),
                    **({"on_unfit": rule.on_unfit} if rule.on_unfit != ON_UNFIT[0] else {}),
                }
                for rule in self.modules
            ],
            "calibration": self.calibration.to_dict(),
        }
        if self.budget is not None:
            block["budget"] = self.budget.to_dict()
        if self.kv_cache is not None:
            block["kv_cache"] = self.kv_cache
        return {**block, "pack_zeros": list(self.pack_zeros)} if self.pack_zeros else block

    @property
    def sha256(self) -> str:
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()


def load_recipe(recipe: str | Path | Mapping[str, Any] | Recipe) -> Recipe:
    """A recipe by shipped name, from a YAML file, or from a mapping; raises `RecipeError`."""
    if isinstance(recipe, Recipe):
        return recipe
    block, where, name = read_recipe(recipe)
    found = parse_recipe(block, where, name)
    beside = found.calibration.beside(Path(where).parent)
    return dataclasses.replace(found, calibration=beside)


def read_recipe(recipe: str | Path | Mapping[str, Any]) -> tuple[Any, str, str]:
    """What a recipe holds, where it is for error messages, and its name; raises `RecipeError`."""
    if isinstance(recipe, Mapping):
        return recipe, "recipe", "custom"
    path = Path(recipe)
    require_path(path, RecipeError)
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
    known_keys(block, (*KEYS, *GATE_KEYS), where)
    packed = _patterns(block["pack_zeros"], f"{where}: pack_zeros") if "pack_zeros" in block else ()
    if packed and not ("formats" in block or "modules" in block or "kv_cache" in block):
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
    on_unfit = _on_unfit(block, where)
    rules = tuple(
        _rule(entry, formats, f"{where}: modules[{i}]", on_unfit) for i, entry in enumerate(modules)
    )
    budget = parse_budget(block, where)
    _check_budget(budget, rules, where)
    settings = parse_calibration(block, where)
    kv_cache = block.get("kv_cache")
    if kv_cache is not None and kv_cache not in KV_CACHES:
        expected = " or ".join(KV_CACHES)
        raise RecipeError(f"{where}: kv_cache is {kv_cache!r}, expected {expected}")
    return Recipe(name, formats, rules, settings, packed, budget=budget, kv_cache=kv_cache)


def parse_calibration(block: Mapping[str, Any], where: str) -> CalibrationSettings:
    """The `calibration:` of a recipe's mapping; raises `RecipeError`."""
    return parse_settings(block.get("calibration") or {}, f"{where}: calibration", RecipeError)


def _on_unfit(block: Mapping[str, Any], where: str, default: str = ON_UNFIT[0]) -> str:
    """What a recipe or a rule says of matrices that do not fit."""
    asked = block.get("on_unfit", default)
    if asked not in ON_UNFIT:
        raise RecipeError(f"{where}: on_unfit is {asked!r}, expected {', '.join(ON_UNFIT)}")
    return str(asked)


def _rule(entry: Any, formats: Mapping[str, Format], where: str, on_unfit: str) -> ModuleRule:
    if not isinstance(entry, Mapping):
        raise RecipeError(f"{where}: expected a mapping, found {entry!r}")
    known_keys(entry, MODULE_KEYS, where)
    patterns = _patterns(entry.get("match"), f"{where}: match")
    names = _names(entry.get("format"), formats, where)
    name = names[0]
    spec = entry.get("algorithm", DEFAULT_ALGORITHM)
    if isinstance(spec, str):
        spec = {"algorithm": spec}
    algorithm = ALGORITHMS.build(spec, "algorithm", where, RecipeError)
    try:
        for each in names:
            algorithm.check_format(formats[each])
    except RecipeError as problem:
        raise RecipeError(f"{where}: {problem}") from problem
    allocates = _allocates(entry, formats[name], algorithm, where)
    candidates = names if len(names) > 1 else ()
    if allocates and candidates:
        raise RecipeError(f"{where}: allocate divides the bytes of one format, found a list")
    unfit = _on_unfit(entry, where, on_unfit)
    return ModuleRule(patterns, name, algorithm, allocates, unfit, candidates)


def _names(format_: Any, formats: Mapping[str, Format], where: str) -> tuple[str, ...]:
    """What `format` holds: the name of a format, or a list of several."""
    names = tuple(map(str, format_)) if isinstance(format_, list) else (str(format_),)
    for name in names:
        if name not in formats:
            raise RecipeError(f"{where}: unknown format {name!r}; {nearest(name, formats)}")
    if isinstance(format_, list) and len(set(names)) < max(2, len(names)):
        raise RecipeError(f"{where}: format is {format_!r}, expected a name or several different")
    return names


def _check_budget(budget: Budget | None, rules: tuple[ModuleRule, ...], where: str) -> None:
    """A budget needs something to choose, and a choice something to be made by."""
    chooses = any(rule.candidates for rule in rules)
    if chooses and budget is None:
        raise RecipeError(f"{where}: format is a list, so `budget: {{bits: 3.5}}` has to decide")
    if budget is not None and not chooses:
        raise RecipeError(
            f"{where}: budget is given, but no entry of modules has a list of formats, "
            "such as `format: [w3, w4]`"
        )


def _allocates(entry: Mapping[str, Any], fmt: Format, algorithm: Algorithm, where: str) -> bool:
    """Whether an entry asks for its bytes to be divided among layers."""
    if OLD_KEY in entry and entry[OLD_KEY] not in (None, OLD_VALUE):
        raise RecipeError(f"{where}: {OLD_KEY} is {entry[OLD_KEY]!r}, expected {OLD_VALUE}")
    asked = entry.get("allocate", ALLOCATE if entry.get(OLD_KEY) else None)
    if asked is None:
        return False
    if asked != ALLOCATE:
        raise RecipeError(f"{where}: allocate is {asked!r}, expected {ALLOCATE}")
    if not (fmt.prunes and algorithm.needs(fmt)):
        raise RecipeError(
            f"{where}: allocate: {ALLOCATE} chooses n of a sparse format by what calibration "
            f"shows; found format {fmt.name!r} and algorithm {algorithm.name!r}"
        )
    return True


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
            if pattern.startswith("re:"):
                compile_pattern(pattern.removeprefix("re:"))
        except PatternError as problem:
            raise RecipeError(f"{where} {pattern[:200]!r}: {problem}") from problem
    return patterns
