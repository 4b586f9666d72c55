"""Formats that a budget leaves open, as a plan takes them.

Which layer needs which is measured when the model is converted. Until then all layers count alike,
with an error that a bit a weight divides by four, so a plan weighs what the budget allows or, by
less than one group of matrices, less. What vLLM runs as one gets one format.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from compress_methods.errors import FormatError, RecipeError
from compress_methods.formats import Format
from compress_methods.model.architecture import GENERIC
from compress_methods.recipe import knapsack
from compress_methods.recipe.schema import ModuleRule, Recipe
from vllm_compress.operations.capacity.footprint.shapes import Matrix, ModelShape

Find = Callable[[str, Matrix], Format | None]


def holds(fmt: Format, matrix: Matrix) -> bool:
    """Whether a matrix can be stored in a format."""
    try:
        fmt.check_shape(matrix.rows, matrix.cols)
    except FormatError:
        return False
    return True


def rule_of(recipe: Recipe, module: str, matrix: Matrix) -> ModuleRule | None:
    """The rule that a matrix falls under."""
    if not matrix.kind:
        return None
    kind = "experts" if matrix.experts and matrix.kind == "blocks" else matrix.kind
    return next((r for r in recipe.modules if r.matches(module, kind)), None)


def spend(recipe: Recipe, shape: ModelShape, find: Find) -> Find:
    """`find`, which knows the formats that are not open, completed by those that are."""
    budget = recipe.budget
    if budget is None:
        return find
    groups: dict[str, list[tuple[str, Matrix]]] = {}
    weights, fixed, kept = 0, 0, 0
    for module, matrix in _each(shape):
        rule = rule_of(recipe, module, matrix)
        values = matrix.rows * matrix.cols * matrix.count
        if rule is not None and rule.candidates:
            groups.setdefault(GENERIC.group_name(module), []).append((module, matrix))
        elif (fmt := find(module, matrix)) is not None:
            fixed += fmt.nbytes(matrix.rows, matrix.cols) * matrix.count
        else:
            kept += round(values * matrix.itemsize)
            continue
        weights += values
    options = [_options(recipe, mine) for mine in groups.values()]
    sizes = [
        [sum(fmt.nbytes(m.rows, m.cols) * m.count for _, m in mine) for fmt in some]
        for mine, some in zip(groups.values(), options, strict=True)
    ]
    allowed = budget.packed(weights=weights, besides=kept, original=shape.weight_bytes)
    if allowed is None:
        raise RecipeError(
            f"recipe {recipe.name!r} takes what a KL needs; convert the model, then plan the result"
        )
    if allowed - fixed < sum(min(some) for some in sizes):
        raise RecipeError(
            f"recipe {recipe.name!r}: budget {budget.to_dict()} cannot be met; the smallest "
            f"formats take {(sum(min(some) for some in sizes) + fixed + kept) / 1e9:,.2f} GB"
        )
    errors = [
        [_error(size, sum(m.rows * m.cols * m.count for _, m in mine)) for size in some]
        for mine, some in zip(groups.values(), sizes, strict=True)
    ]
    chosen = knapsack.exact(errors, sizes, allowed - fixed)
    formats = {
        module: some[i]
        for mine, some, i in zip(groups.values(), options, chosen, strict=True)
        for module, _ in mine
    }
    return lambda module, matrix: formats.get(module) or find(module, matrix)


def _each(shape: ModelShape) -> Iterator[tuple[str, Matrix]]:
    for matrix in shape.matrices:
        for layer in matrix.layers or (None,):
            yield matrix.name(layer), matrix


def _options(recipe: Recipe, mine: list[tuple[str, Matrix]]) -> list[Format]:
    """What all matrices of a group can be stored in."""
    found: list[Format] | None = None
    for module, matrix in mine:
        rule = rule_of(recipe, module, matrix)
        assert rule is not None
        fits = [
            rule.choose(recipe.formats[name], lambda fmt, m=matrix: holds(fmt, m), matrix.cols)  # type: ignore[misc]
            for name in rule.candidates
        ]
        mine_too = [fmt for fmt in fits if fmt is not None]
        found = mine_too if found is None else [fmt for fmt in found if fmt in mine_too]
    if not found:
        raise RecipeError(f"recipe {recipe.name!r}: no format of the list fits {mine[0][0]}")
    return found


def _error(size: int, weights: int) -> float:
    return weights * 4.0 ** (-8 * size / weights)
