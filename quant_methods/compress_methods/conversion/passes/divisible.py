"""divisible: whether several processes can carry out a conversion, told before any work.

What is divided: the calibration text, where all that is learned of it are sums over tokens, and the
matrices to solve. What looks at the states themselves, or tries one thing after another, is carried
out by one process: transforms, `accept`, searches, and of a packing what is refused here. Of a
recipe that trains each segment is told apart, see `training/staged.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

from compress_methods.conversion.part import Planned
from compress_methods.conversion.passes.allocation import find_groups
from compress_methods.errors import RecipeError
from compress_methods.recipe.stages import StagedRecipe


def require_divisible_recipe(recipe: StagedRecipe, count: int) -> None:
    """`RecipeError` where a recipe cannot be carried out by so many processes, as far as it tells
    without a model."""
    rules = recipe.packing.modules if recipe.packing is not None else ()
    asked = {
        "accept": recipe.accept is not None,
        "search": recipe.search is not None or recipe.level is not None,
        "loss_groups": any(rule.algorithm.loss_groups for rule in rules),
        **{visitor.name: True for visitor in recipe.transforms},
        **{rule.algorithm.name: True for rule in rules if rule.algorithm.refinement is not None},
    }
    _require_none(recipe.name, [name for name, is_asked in asked.items() if is_asked], count)


def require_divisible(planned: Planned, runs_text: bool, count: int) -> None:
    """The same of a packing as planned."""
    recipe = planned.plan.recipe
    _require_none(recipe.name, list(_undivided(planned)), count)
    if runs_text and recipe.calibration.samples < count:
        raise RecipeError(
            f"recipe {recipe.name!r}: calibration: samples is {recipe.calibration.samples}, "
            f"expected at least one for each of {count} processes"
        )


def is_divisible(recipe: StagedRecipe, planned: Planned, runs_text: bool, count: int) -> bool:
    """Whether so many processes can carry out a recipe as planned."""
    try:
        require_divisible_recipe(recipe, count)
        require_divisible(planned, runs_text, count)
    except RecipeError:
        return False
    return True


def _undivided(planned: Planned) -> Iterator[str]:
    plan = planned.plan
    if find_groups(plan, planned.skeleton.architecture):
        yield "choosing among formats (budget, allocate)"
    for job in plan.jobs:
        yield from (cls.__name__ for cls in job.algorithm.needs(job.format) if not cls.sums)


def _require_none(recipe: str, asked: list[str], count: int) -> None:
    if count > 1 and asked:
        raise RecipeError(
            f"recipe {recipe!r}: {asked[0]} is carried out by one process, and {count} were "
            "started; start it without torchrun"
        )
