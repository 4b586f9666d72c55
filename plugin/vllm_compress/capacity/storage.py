"""What a recipe makes of each matrix, in bytes, before anything is converted.

`Format.nbytes` is exact, but importing it imports torch, which takes longer than a whole plan. So
`configs/storage.json` keeps, for each format of a shipped recipe, four numbers that say the same

    bytes of [rows, cols] = per_weight * rows * cols + per_row * rows + per_col * cols + constant

measured from `Format.nbytes` by `measure`; a test measures them again. A format that is not in the
table (your own recipe, an already compressed directory) is asked itself.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

from compress_methods.conversion.names import matches, recipe_names
from compress_methods.errors import FormatError, RecipeError
from compress_methods.resources import config_path
from vllm_compress.capacity.shapes import Matrix, ModelShape

ORIGINAL, STORED = "original", "as stored"
KEYS = {"formats", "modules", "calibration"}
DTYPES = {1: "8-bit", 2: "bf16", 4: "fp32"}


class Storage(Protocol):
    """How [rows, cols] matrices are stored: a `Format`, or what is known of one without torch."""

    def nbytes(self, rows: int, cols: int) -> int: ...

    def units(self, rows: int, cols: int) -> tuple[int, int]: ...

    def describe(self) -> str: ...

    def to_dict(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Plain:
    """Kept as it is."""

    itemsize: int = 2

    def nbytes(self, rows: int, cols: int) -> int:
        return rows * cols * self.itemsize

    def units(self, rows: int, cols: int) -> tuple[int, int]:
        return 1, 1

    def describe(self) -> str:
        return DTYPES.get(self.itemsize, f"{8 * self.itemsize}-bit")

    def to_dict(self) -> dict[str, Any]:
        return {"format": "dense"}


@dataclass(frozen=True)
class Known:
    """The numbers of one format that the module's docstring speaks of; fields as in storage.json.

    `row_unit` and `col_unit` are the smallest piece the matrix can be cut at.
    """

    text: str
    per_weight: float
    per_row: float
    per_col: float
    constant: float
    row_unit: int
    col_unit: int
    spec: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def nbytes(self, rows: int, cols: int) -> int:
        if rows % self.row_unit or cols % self.col_unit:
            unit = (self.row_unit, self.col_unit)
            raise FormatError(f"[{rows}, {cols}] is no multiple of {list(unit)} ({self.text})")
        exact = rows * (cols * self.per_weight + self.per_row) + cols * self.per_col
        return round(exact + self.constant)

    def units(self, rows: int, cols: int) -> tuple[int, int]:
        return self.row_unit, self.col_unit

    def describe(self) -> str:
        return self.text

    def to_dict(self) -> dict[str, Any]:
        return dict(self.spec)


def measure(fmt: Any, spec: Mapping[str, Any]) -> Known:
    """The numbers of a `Format`, from its bytes for four sizes."""
    row_unit, col_unit = fmt.units(1024, 1024)
    n = 1024
    one, wide, tall, large = (fmt.nbytes(r * n, c * n) for r, c in ((1, 1), (1, 2), (2, 1), (2, 2)))
    area = large - wide - tall + one
    per_col, per_row = wide - one - area, tall - one - area
    constant = one - area - per_col - per_row
    return Known(
        fmt.describe(), area / n**2, per_row / n, per_col / n, constant, row_unit, col_unit, spec
    )


def tabulate() -> str:
    """The text of configs/storage.json; imports torch."""
    from compress_methods.conversion.recipe import load_recipe

    table: dict[str, Any] = {}
    for name in recipe_names():
        block = _read(name)
        if set(block) <= KEYS:
            formats = load_recipe(name).formats
            for key, spec in block["formats"].items():
                numbers = dataclasses.asdict(measure(formats[key], spec))
                table[_key(spec)] = {k: v for k, v in numbers.items() if k != "spec"}
    return json.dumps(table, indent=1, sort_keys=True) + "\n"


@lru_cache
def _table() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(config_path("storage.json").read_text(encoding="utf-8"))
    return found


def _key(spec: Mapping[str, Any]) -> str:
    return json.dumps(spec, sort_keys=True)


def _read(name: str) -> dict[str, Any]:
    import yaml

    text = config_path("recipes", f"{name}.yaml").read_text(encoding="utf-8")
    block: dict[str, Any] = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return block


@dataclass(frozen=True)
class Part:
    """Matrices of one name that are stored alike."""

    matrix: Matrix
    storage: Storage

    @property
    def nbytes(self) -> int:
        m = self.matrix
        return self.storage.nbytes(m.rows, m.cols) * m.count * max(1, len(m.layers))


@dataclass(frozen=True)
class Scheme:
    """A model stored in one way. `label` names the formats of its compressed matrices."""

    name: str
    label: str
    shape: ModelShape
    parts: tuple[Part, ...]

    @property
    def weight_bytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def experts_compressed(self) -> bool:
        return any(
            p.matrix.experts and p.matrix.kind and not isinstance(p.storage, Plain)
            for p in self.parts
        )


def as_it_is(shape: ModelShape) -> Scheme:
    """The model as its files hold it."""
    if shape.path is not None and shape.quantized == "vllm_compress":
        return _compressed(shape)
    parts = tuple(Part(m, Plain(m.itemsize)) for m in shape.matrices)
    sizes = {m.itemsize for m in shape.matrices if m.kind == "blocks"}
    label = shape.quantized or DTYPES.get(max(sizes, default=2), "mixed")
    return Scheme(STORED if shape.quantized else ORIGINAL, label, shape, parts)


def _compressed(shape: ModelShape) -> Scheme:
    from compress_methods.compressed import open_compressed

    assert shape.path is not None
    found = open_compressed(shape.path).matrices
    storages: dict[str, Storage] = {name: matrix.format for name, matrix in found.items()}
    parts = _assign(shape, lambda module, matrix: storages.get(module))
    return Scheme(STORED, _label(parts), shape, parts)


def apply_recipe(shape: ModelShape, recipe: str) -> Scheme:
    """The model as a recipe would store it; `RecipeError` where the two do not fit."""
    if shape.quantized is not None:
        raise RecipeError(
            f"{shape.name}: already quantized ({shape.quantized}), so no recipe applies; "
            "plan it without --recipe, or plan the original"
        )
    name, formats, rules = _recipe(recipe)

    def find(module: str, matrix: Matrix) -> Storage | None:
        if not matrix.kind:
            return None
        rule = next((r for r in rules if matches(r[0], module, matrix.kind)), None)
        return None if rule is None else formats[rule[1]]

    parts = _assign(shape, find)
    if all(isinstance(part.storage, Plain) for part in parts):
        raise RecipeError(f"recipe {name!r} matches no module of {shape.name}")
    for part in parts:
        try:
            part.storage.nbytes(part.matrix.rows, part.matrix.cols)
        except FormatError as problem:
            raise RecipeError(f"recipe {name!r}: {part.matrix.module}: {problem}") from problem
    return Scheme(name, _label(parts), shape, parts)


def _recipe(recipe: str) -> tuple[str, dict[str, Storage], list[tuple[tuple[str, ...], str]]]:
    """Name, formats and (match, format) of a recipe, without torch for those that are shipped."""
    if recipe in recipe_names():
        block = _read(recipe)
        _check_keys(recipe, block)
        if all(_key(spec) in _table() for spec in block["formats"].values()):
            known = {k: Known(**_table()[_key(s)], spec=s) for k, s in block["formats"].items()}
            return recipe, dict(known), [(_patterns(r), r["format"]) for r in block["modules"]]
    from compress_methods.conversion.recipe import parse_recipe, read_recipe
    from compress_methods.formats.dense import Dense

    given, where, name = read_recipe(recipe)
    _check_keys(recipe, given)
    loaded = parse_recipe(given, where, name)
    formats: dict[str, Storage] = {
        name: Plain() if isinstance(fmt, Dense) else fmt for name, fmt in loaded.formats.items()
    }
    return loaded.name, formats, [(rule.match, rule.format) for rule in loaded.modules]


def _check_keys(recipe: str, block: Any) -> None:
    """`RecipeError` where shapes or weights decide what is stored, not the recipe alone."""
    found = set(block) if isinstance(block, Mapping) else set()
    extra = sorted({"stages", "prune_to", "pack_zeros"} & found)
    if extra:
        raise RecipeError(
            f"recipe {recipe!r} does more than store matrices in another format "
            f"({', '.join(extra)}); convert the model, then plan the result"
        )


def _patterns(rule: Mapping[str, Any]) -> tuple[str, ...]:
    match = rule["match"]
    return tuple(match) if isinstance(match, list) else (match,)


def _assign(shape: ModelShape, find: Callable[[str, Matrix], Storage | None]) -> tuple[Part, ...]:
    """Parts of a shape; `find(module name, matrix)` gives a storage, or None to keep it."""
    parts = []
    for matrix in shape.matrices:
        alike: dict[str, tuple[Storage, list[int]]] = {}
        for layer in matrix.layers or (None,):
            storage = find(matrix.name(layer), matrix) or Plain(matrix.itemsize)
            _, layers = alike.setdefault(storage.describe(), (storage, []))
            layers += [] if layer is None else [layer]
        for storage, layers in alike.values():
            parts.append(Part(dataclasses.replace(matrix, layers=tuple(layers)), storage))
    return tuple(parts)


def _label(parts: tuple[Part, ...]) -> str:
    found = {p.storage.describe() for p in parts if not isinstance(p.storage, Plain)}
    return ", ".join(sorted(found)) or "bf16"
