"""Experts while they are packed: how many at once, and what those get that hardly saw any text.

Statistics of every expert's inputs can be larger than the block they are of, so they are gathered
for as many experts at a time as `LIMIT` holds, and the text runs through the block again for the
next. An expert that few tokens came to is solved as if its inputs were white noise: any algorithm
then keeps the weights themselves as well as it can, as rounding to nearest does. The report names
it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from compress_methods.algorithms import Seen, Statistic
from compress_methods.algorithms.statistics import Comparison
from compress_methods.conversion.part import StreamedPart
from compress_methods.conversion.passes.comparing import Needs
from compress_methods.conversion.planning.plan import Job
from compress_methods.model.experts import owner_of
from compress_methods.model.slot import Slot
from compress_methods.system.portions import portions

EXPERTS = "experts"
LIMIT, SHARE = 2**27, 8
"""Bytes of statistics in memory: so many, or this part of what the experts take."""
LEAST_TOKENS, COLUMNS_PER_TOKEN = 32, 4
"""Of text, to be calibrated on it: the latter where columns go together. On novels-8m gptq in 3
bits lost a fifth less than rounding at as many, half as much at 8 times as many."""
FLOAT = 4


def expert_of(slot: Slot) -> tuple[str, int]:
    """Name of the module of all experts, and the number of this one."""
    number = slot.index[0]
    assert isinstance(number, int)
    return owner_of(slot), number


def rounds(jobs: Sequence[Job]) -> Iterator[list[Job]]:
    """The matrices of as many whole experts at a time as there is memory for."""
    weights = sum(job.slot.rows * job.slot.cols for job in jobs)
    for experts in portions(_by_expert(jobs), _gathered, max(LIMIT, FLOAT * weights // SHARE)):
        yield [job for mine in experts for job in mine]


def most_gathered(jobs: Sequence[Job]) -> int:
    """Bytes of statistics that are in memory at once while the experts among `jobs` are packed."""
    mine = [job for job in jobs if job.slot.kind == EXPERTS]
    return max((sum(map(_gathered, _by_expert(r))) for r in rounds(mine)), default=0)


def _by_expert(jobs: Sequence[Job]) -> list[list[Job]]:
    experts: dict[tuple[str, int], list[Job]] = {}
    for job in jobs:
        experts.setdefault(expert_of(job.slot), []).append(job)
    return list(experts.values())


def _gathered(jobs: Sequence[Job]) -> int:
    """Bytes of the statistics of an expert; matrices with as many columns share theirs."""
    sizes: dict[tuple[int, type[Statistic]], int] = {}
    for job in jobs:
        cols = job.slot.cols
        for cls in _alone(job.algorithm.needs(job.format)):
            sizes[cols, cls] = FLOAT * cols * (cols if cls.correlates else 1)
    return sum(sizes.values())


def fed(
    part: StreamedPart, needs: Needs, seen: Mapping[str, Seen]
) -> tuple[dict[str, Seen], dict[str, int]]:
    """What to solve each matrix of an expert from, and how many tokens of text it saw."""
    given: dict[str, Seen] = {}
    tokens: dict[str, int] = {}
    starved: dict[str, list[int]] = {}
    white: dict[tuple[int, type[Statistic]], Statistic] = {}
    slots = part.skeleton.slots
    for module, classes in needs.items():
        if not classes or slots[module].kind != EXPERTS:
            continue
        given[module] = seen.get(module, {})
        tokens[module] = max((s.tokens for s in given[module].values()), default=0)
        cols = slots[module].cols
        if tokens[module] < _least(classes, cols):
            given[module] = {cls: _white(cls, cols, part.device, white) for cls in _alone(classes)}
            owner, number = expert_of(slots[module])
            numbers = starved.setdefault(owner, [])
            if number not in numbers:
                numbers.append(number)
    for owner, numbers in starved.items():
        part.note(owner, _told(part.notes.get(owner), numbers))
    return given, tokens


def _least(classes: Sequence[type[Statistic]], cols: int) -> int:
    """Tokens that a matrix needs to be calibrated on them."""
    correlates = any(cls.correlates for cls in classes)
    return max(LEAST_TOKENS, cols // COLUMNS_PER_TOKEN if correlates else 0)


def _alone(classes: Sequence[type[Statistic]]) -> list[type[Statistic]]:
    """Without what compares with the original, whose router may send other tokens."""
    return [cls for cls in classes if not issubclass(cls, Comparison)]


def _white(
    cls: type[Statistic],
    cols: int,
    device: torch.device,
    made: dict[tuple[int, type[Statistic]], Statistic],
) -> Statistic:
    """A statistic of inputs that are all alike and go together in no way."""
    if (cols, cls) not in made:
        statistic = cls(cols, device)
        statistic.add_batch(torch.eye(cols, device=device))
        statistic.tokens = cols
        made[cols, cls] = statistic
    return made[cols, cls]


def _told(before: str | None, numbers: Sequence[int]) -> str:
    """One line for all starved experts of a layer."""
    known = before.partition(":")[0].removeprefix("experts ") + ", " if before else ""
    return (
        f"experts {known}{', '.join(map(str, numbers))}: too few tokens of the calibration text, "
        "packed as without text"
    )
