"""Matrices that passes have stored as others are.

A pass says so in its outline, of whole modules: whatever is packed below the one is stored as what
lies below the other, which comes first, since a sweep writes it first. A pass that looks ahead can
at first say only how many, so all layers have to be packed alike: the plan that is made again when
it has decided then has the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

from compress_methods.checkpoint.interchange import Layout
from compress_methods.checkpoint.source import Source
from compress_methods.conversion.planning.plan import Job, Plan, make_plan
from compress_methods.errors import RecipeError
from compress_methods.model.skeleton import Skeleton
from compress_methods.recipe.schema import Recipe
from compress_methods.transforms import Pass


def find_aliases(passes: Sequence[Pass], skeleton: Skeleton) -> dict[str, str]:
    """Matrices that passes have stored as others are; the owner comes first."""
    found: dict[str, str] = {}
    for visitor in passes:
        aliases = visitor.plan(skeleton).aliases
        other = next((each for each in passes if each is not visitor), None)
        if aliases and other is not None:
            raise RecipeError(
                f"{visitor.name}: layers that share matrices cannot be changed each on its own; "
                f"leave out {other.name}"
            )
        for alias, owner in aliases.items():
            slots = [name for name in skeleton.slots if f"{name}.".startswith(f"{alias}.")]
            for name in slots:
                found[name] = owner + name.removeprefix(alias)
    order = list(skeleton.slots)
    for alias, owner in found.items():
        if owner not in skeleton.slots or order.index(owner) >= order.index(alias):
            raise RecipeError(
                f"{alias}: cannot be stored as {owner}, which does not come before it"
            )
    return found


def plan_shared(
    passes: Sequence[Pass],
    recipe: Recipe,
    skeleton: Skeleton,
    source: Source,
    ways: int,
    layout: Layout,
) -> Plan:
    """The plan of a packing with what `passes` have stored once; `RecipeError`."""
    aliases = find_aliases(passes, skeleton)
    ahead = [visitor for visitor in passes if visitor.looks_ahead]
    if aliases and ahead:
        whole = make_plan(recipe, skeleton, source, ways, layout=layout, packs_dense=True)
        _check_alike(ahead[0].name, whole, skeleton)
    return make_plan(recipe, skeleton, source, ways, aliases, layout, packs_dense=bool(aliases))


def share_again(passes: Sequence[Pass], plan: Plan, skeleton: Skeleton, source: Source) -> Plan:
    """A plan after passes that look ahead have decided what is stored as what."""
    aliases = find_aliases(passes, skeleton)
    if not aliases or aliases.items() <= plan.tied.items():
        return plan
    return make_plan(
        plan.recipe, skeleton, source, plan.ways, aliases, plan.layout, packs_dense=True
    )


def _check_alike(name: str, plan: Plan, skeleton: Skeleton) -> None:
    """`RecipeError` unless every layer has the same matrices, packed in the same format."""
    jobs = {job.slot.module: job for job in plan.jobs}
    first: dict[str, str] = {}
    for module, slot in skeleton.slots.items():
        if slot.kind != "blocks":
            continue
        found = _stored_as(jobs.get(module), module, name)
        tail = module.removeprefix(f"{skeleton.blocks_name}.").partition(".")[2]
        if first.setdefault(tail, found) != found:
            raise RecipeError(
                f"{name}: {module} is {found}, in another layer it is {first[tail]}; layers that "
                "are to share matrices need the same rules"
            )


def _stored_as(job: Job | None, module: str, name: str) -> str:
    if job is None:
        raise RecipeError(
            f"{name}: {module} is kept as it is, but only what is packed can be shared; add a rule "
            "for it"
        )
    if job.choices:
        raise RecipeError(
            f"{name}: {module} has several formats to choose from, but layers that share matrices "
            "need the same; give one format, without allocate"
        )
    return f"{job.format.describe()} {[job.slot.rows, job.slot.cols]}"
