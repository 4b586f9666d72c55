"""What a recipe makes of each matrix, in bytes, before anything is converted.

Recipes and formats are read without torch, so a plan asks the declarations that the converter
writes by.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from compress_methods.checkpoint.compressed import open_compressed
from compress_methods.errors import FormatError, RecipeError
from compress_methods.formats import Format
from compress_methods.formats.dense import Dense
from compress_methods.recipe.schema import Recipe
from compress_methods.recipe.stages import load_staged
from vllm_compress.names import QUANT_METHOD
from vllm_compress.operations.capacity.footprint.from_config import SERVED
from vllm_compress.operations.capacity.footprint.open_formats import holds, rule_of, spend
from vllm_compress.operations.capacity.footprint.shapes import NUMBER, Matrix, ModelShape

ORIGINAL, STORED = "original", "as stored"
UNKNOWN = -1
"""The layer that another will share the matrices of, before that is measured."""
EXPERTS_HANDED = "experts that a recipe compresses are multiplied by vLLM's kernels on GPUs"
DTYPES = {1: "8-bit", 2: "bf16", 4: "fp32"}


@dataclass(frozen=True)
class Part:
    """Matrices of one name that are stored alike; `format` None: kept as they are. `shared`: layers
    that have the matrix of another one, by its number."""

    matrix: Matrix
    format: Format | None = None
    shared: Mapping[int, int] = field(default_factory=dict)

    def bytes_of(self, rows: int, cols: int) -> int:
        """Bytes of [rows, cols] stored so."""
        if self.format is None:
            return round(rows * cols * self.matrix.itemsize)
        return self.format.nbytes(rows, cols)

    @property
    def copied(self) -> bool:
        """Whether every rank holds all of it: nothing of its tensors is cut."""
        if self.format is None:
            return False
        specs = self.format.tensors(self.matrix.rows, self.matrix.cols).values()
        return not any(spec.rows_axis or spec.cols_axis for spec in specs)

    @property
    def nbytes(self) -> int:
        m = self.matrix
        stored = max(1, len(m.layers)) - len(self.shared)
        return self.bytes_of(m.rows, m.cols) * m.count * stored


@dataclass(frozen=True)
class Scheme:
    """A model stored in one way. `label` names the formats of its compressed matrices.

    A `draft` may write ahead of it, whose tokens it takes at a rate of `acceptance`.
    """

    name: str
    label: str
    shape: ModelShape
    parts: tuple[Part, ...]
    draft: Scheme | None = None
    acceptance: float = 0.0

    @property
    def weight_bytes(self) -> int:
        """Of a draft too."""
        drafts = self.draft.weight_bytes if self.draft is not None else 0
        return sum(part.nbytes for part in self.parts) + drafts

    @property
    def alone(self) -> Scheme:
        """The same without its draft."""
        return dataclasses.replace(self, draft=None, acceptance=0.0)

    @property
    def experts_compressed(self) -> bool:
        return any(p.matrix.experts and p.matrix.kind and p.format for p in self.parts)


def as_it_is(shape: ModelShape) -> Scheme:
    """Take the model as its files hold it."""
    if shape.path is not None and shape.quantized == QUANT_METHOD:
        found = open_compressed(shape.path)
        formats = {name: matrix.format for name, matrix in found.held.items()}
        owners = {alias: int(NUMBER.findall(o)[0]) for alias, o in found.shared.items()}
        parts = _assign(shape, lambda module, matrix: formats.get(module), owners)
        return Scheme(STORED, _label(parts), shape, parts)
    sizes = {m.itemsize for m in shape.matrices if m.kind == "blocks"}
    label = shape.quantized or DTYPES.get(round(max(sizes, default=2)), "mixed")
    parts = tuple(Part(m) for m in shape.matrices)
    return Scheme(STORED if shape.quantized else ORIGINAL, label, shape, parts)


def apply_recipe(shape: ModelShape, recipe: str) -> Scheme:
    """Store the model as a recipe would; `RecipeError` where the two do not fit."""
    if shape.quantized is not None:
        shape = _unpacked(shape)
    loaded = _packing(shape, recipe)

    def find(module: str, matrix: Matrix) -> Format | None:
        rule = rule_of(loaded, module, matrix)
        fmt = None if rule is None else loaded.formats[rule.format]
        if rule is None or fmt is None or isinstance(fmt, Dense):
            return None
        found = rule.choose(fmt, lambda f: holds(f, matrix), matrix.cols)
        return fmt if found is None and rule.on_unfit != "keep" else found

    parts = _assign(shape, spend(loaded, shape, find), _sharing(shape, recipe))
    if all(part.format is None for part in parts):
        raise RecipeError(f"recipe {loaded.name!r} matches no module of {shape.name}")
    for part in parts:
        try:
            part.bytes_of(part.matrix.rows, part.matrix.cols)
        except FormatError as problem:
            raise RecipeError(
                f"recipe {loaded.name!r}: {part.matrix.module}: {problem}"
            ) from problem
    return Scheme(loaded.name, _label(parts), shape, parts)


def _unpacked(shape: ModelShape) -> ModelShape:
    """A model that another tool quantized as `convert` reads it: matrices of 16 bits."""
    # Here, because layouts take longer to import than a plan of a model that has none.
    from compress_methods.checkpoint.interchange import LAYOUTS

    if shape.quantized == QUANT_METHOD or shape.quantized not in list(LAYOUTS):
        raise RecipeError(
            f"{shape.name}: already quantized ({shape.quantized}), so no recipe applies; "
            "plan it without --recipe, or plan the original"
        )
    matrices = (dataclasses.replace(m, itemsize=max(m.itemsize, SERVED)) for m in shape.matrices)
    return dataclasses.replace(shape, matrices=tuple(matrices))


def _packing(shape: ModelShape, recipe: str) -> Recipe:
    """The part of a recipe that stores matrices; `RecipeError` where others change shapes. Of one
    with a gate, what it tries first."""
    staged = load_staged(recipe)
    unknown = [t.name for t in staged.transforms if t.reshapes and not (t.turns and not shape.tied)]
    unknown += ["prune_to"] if staged.prune_to is not None else []
    unknown += ["pack_zeros"] if staged.packing is not None and staged.packing.pack_zeros else []
    if unknown or staged.packing is None:
        raise RecipeError(
            f"recipe {recipe!r} does more than store matrices in another format "
            f"({', '.join(unknown) or 'stages'}); convert the model, then plan the result"
        )
    return staged.packing


def _sharing(shape: ModelShape, recipe: str) -> dict[str, int]:
    """Modules that a recipe gives the matrix of another layer. Which one is measured later."""
    owners = [visitor.owners(shape.layers) for visitor in load_staged(recipe).transforms]
    shared = {i for layers in owners for i, owner in enumerate(layers) if i != owner}
    blocks = [matrix for matrix in shape.matrices if matrix.kind == "blocks" and not matrix.experts]
    return {m.name(i): UNKNOWN for m in blocks for i in m.layers if i in shared}


def _assign(
    shape: ModelShape,
    find: Callable[[str, Matrix], Format | None],
    owners: Mapping[str, int],
) -> tuple[Part, ...]:
    """Parts of a shape; `find(module name, matrix)` gives a format, or None to keep it. `owners`:
    layers whose matrices modules share."""
    parts = []
    for matrix in shape.matrices:
        alike: dict[Format | None, list[int]] = {}
        for layer in matrix.layers or (None,):
            layers = alike.setdefault(find(matrix.name(layer), matrix), [])
            layers += [] if layer is None else [layer]
        for fmt, layers in alike.items():
            shared = {i: owners[name] for i in layers if (name := matrix.name(i)) in owners}
            mine = dataclasses.replace(matrix, layers=tuple(layers))
            parts.append(Part(mine, fmt, shared if fmt is not None else {}))
    return tuple(parts)


def _label(parts: tuple[Part, ...]) -> str:
    found = {part.format.describe() for part in parts if part.format is not None}
    return ", ".join(sorted(found)) or "bf16"
