"""Where a recipe leaves the format of a matrix open: what it may be stored in, and in which bytes.

Matrices that vLLM runs as one get one format, so only what all of them can be stored in remains.
Until measurements decide, each is planned in the smallest; the bytes that a budget leaves beyond
that are reserved, so that whoever asks a plan is told the most that can come out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress_methods.checkpoint.interchange import Layout
from compress_methods.checkpoint.interchange.own import OWN
from compress_methods.checkpoint.sharding import check_matrix
from compress_methods.conversion.planning.fit import fits, why_unfit
from compress_methods.errors import FormatError, RecipeError
from compress_methods.formats import Format
from compress_methods.formats.dense import Dense
from compress_methods.formats.sparse import Sparse
from compress_methods.formats.wrappers.padded import Padded
from compress_methods.formats.wrappers.smaller_group import group_of
from compress_methods.model.architecture import Architecture
from compress_methods.model.skeleton import Skeleton
from compress_methods.model.slot import Slot
from compress_methods.recipe.schema import ModuleRule, Recipe

if TYPE_CHECKING:
    from compress_methods.conversion.planning.plan import Job

STEPS = 16
EXPERTS = re.compile(r"(?<=\.experts)\..*")


@dataclass(frozen=True)
class Found:
    """Formats that a matrix can be stored in, by name; `why` another one would not fit."""

    formats: Mapping[str, Format]
    why: str = ""


def find_formats(
    rule: ModuleRule, slot: Slot, recipe: Recipe, ways: int, skeleton: Skeleton, layout: Layout
) -> Found:
    """What a rule offers a matrix, in the rule's order; smaller groups where it lets them be."""
    offered: dict[str, Format] = {}
    reason = ""
    check = functools.partial(fits, slot, ways=ways, skeleton=skeleton, layout=layout)
    for name in rule.candidates or (rule.format,):
        fmt: Format | None = recipe.formats[name]
        assert fmt is not None
        why = why_unfit(slot, fmt, ways, skeleton, layout)
        if why is not None:
            reason = reason or why
            fmt = rule.choose(fmt, check, slot.cols, ways if layout is OWN else 1)
            if fmt is None:
                continue
            name = name_of(fmt, name, recipe.formats)
        if fmt not in offered.values():
            offered[name] = fmt
    return Found(offered, reason)


def name_of(smaller: Format, name: str, formats: Mapping[str, Format]) -> str:
    """A format's name with its group, unlike all that the recipe gives to others."""
    if isinstance(smaller, Padded):
        name = f"{name}-padded{smaller.cols}" + (f"by{smaller.parts}" if smaller.parts > 1 else "")
    name = f"{name}-g{group_of(smaller)}"
    while formats.get(name, smaller) != smaller:
        name += "-smaller"
    return name


def check_candidates(rule: ModuleRule, slot: Slot, recipe: Recipe, layout: Layout) -> None:
    """`RecipeError` where no choice can be left open."""
    where = f"recipe {recipe.name!r}: format is a list for {slot.module}"
    if slot.kind not in ("blocks", "experts"):
        raise RecipeError(f"{where}, but only matrices of the decoder blocks are measured")
    if layout is not OWN:
        raise RecipeError(f"{where}; another tool's layout takes recipes of one format")
    for name in rule.candidates:
        if isinstance(recipe.formats[name], Dense):
            raise RecipeError(f"{where}, but {name!r} is dense, which is not compressed")


def around(fmt: Sparse, slot: Slot, ways: int, skeleton: Skeleton) -> Iterator[Sparse]:
    """The format at up to seven n, its own in the middle: those that can hold the matrix and be cut
    for `ways` ranks."""
    step = max(1, fmt.m // STEPS)
    for n in range(fmt.n - 3 * step, fmt.n + 3 * step + 1, step):
        if 0 < n < fmt.m or n == fmt.n:
            other = dataclasses.replace(fmt, n=n)
            with contextlib.suppress(FormatError):
                shape = (slot.rows, slot.cols)
                other.check_shape(*shape)
                check_matrix(slot.module, slot.kind, shape, other, ways, skeleton.architecture)
                yield other


def group_of_module(module: str, architecture: Architecture) -> str:
    """The same name for matrices that vLLM runs as one, all experts of a layer among them."""
    return EXPERTS.sub("", architecture.group_name(module))


def tie(
    jobs: Mapping[str, Job], architecture: Architecture, formats: Mapping[str, Format]
) -> dict[str, Job]:
    """The jobs with the choices that all of their group have, smallest first, which is planned;
    where one is left, it is taken. `formats` are the recipe's."""
    groups: dict[str, list[Job]] = {}
    for job in jobs.values():
        groups.setdefault(group_of_module(job.slot.module, architecture), []).append(job)
    out = dict(jobs)
    for name, mine in groups.items():
        if not any(job.open for job in mine):
            continue
        if not all(job.open for job in mine):
            raise RecipeError(f"{name}: run as one by vLLM, so all of it needs a list, or none")
        shared = [v for v in mine[0].variants if all(v in job.variants for job in mine)]
        if not shared:
            raise RecipeError(
                f"{name}: run as one by vLLM, but no format of the list fits them all"
            )
        by_size = sorted(shared, key=lambda v: sum(job.nbytes(job.choice(v)) for job in mine))
        for job in mine:
            first = dataclasses.replace(
                job, format=job.choice(by_size[0]), format_name=str(by_size[0])
            )
            out[job.slot.module] = dataclasses.replace(
                first,
                choices=tuple(job.choice(v) for v in by_size) if len(by_size) > 1 else (),
                variants=tuple(by_size) if len(by_size) > 1 else (),
                regrouped="" if first.format_name in formats else job.regrouped,
            )
    return out


@dataclass(frozen=True)
class Allowance:
    """What the matrices with a choice may take together (None: as the recipe's own formats, or to
    be searched for), and how many bytes more than in their smallest formats come of it at most."""

    bytes: int | None = None
    reserved: int = 0


def allowance(recipe: Recipe, jobs: Mapping[str, Job], kept: int, original: int) -> Allowance:
    """What a budget comes to; `RecipeError` where the smallest formats take more.

    `kept` are the bytes of what is not compressed, `original` those of what goes in.
    """
    if recipe.budget is None:
        return Allowance()
    undecided = [job for job in jobs.values() if job.open]
    fixed = sum(job.nbytes(job.format) for job in jobs.values() if not job.open)
    least = sum(job.nbytes(job.format) for job in undecided)
    most = sum(max(map(job.nbytes, job.choices)) for job in undecided)
    weights = sum(job.slot.rows * job.slot.cols for job in jobs.values())
    packed = recipe.budget.packed(weights=weights, besides=kept, original=original)
    if packed is None:
        return Allowance(None, most - least)
    if packed - fixed < least:
        raise RecipeError(
            f"recipe {recipe.name!r}: budget {recipe.budget.to_dict()} cannot be met; in their "
            f"smallest formats the compressed matrices take {8 * (least + fixed) / weights:.2f} "
            f"bits a weight, and all tensors {least + fixed + kept:,} bytes"
        )
    return Allowance(packed - fixed, min(packed - fixed, most) - least)
