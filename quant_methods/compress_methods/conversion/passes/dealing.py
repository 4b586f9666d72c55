"""dealing: which of several processes solves which matrix, and what it solved told to all.

Matrices that share statistics go to one process, which prepares those once; where there are fewer
such groups than processes, each matrix by itself. The most work goes first, to whoever has least.
All processes deal alike, and go through the matrices in the same order. Only what is stored is
sent: each unpacks the values itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress_methods.algorithms import Seen
from compress_methods.conversion.part import Facts
from compress_methods.conversion.planning.plan import Job
from compress_methods.system.processes import Processes


@dataclass(frozen=True)
class Solution:
    """Packed tensors of a matrix, what the report says of it, and what the values were to come
    close to, where this process has solved it."""

    tensors: dict[str, Tensor]
    facts: Facts
    aim: Tensor | None = None


def solutions(
    jobs: Sequence[Job],
    seen: Mapping[str, Seen],
    solve: Callable[[Job], Solution],
    device: torch.device,
    processes: Processes,
) -> Iterator[tuple[Job, Solution]]:
    """What becomes of each matrix, in order; `solve` is called for those of this process."""
    if processes.count == 1:
        yield from ((job, solve(job)) for job in jobs)
        return
    owners = deal(jobs, seen, processes.count)
    mine = [job for job in jobs if owners[job.slot.module] == processes.rank]
    solved: dict[str, Solution] = {}
    for job in mine:
        found = solve(job)
        solved[job.slot.module] = Solution(found.tensors, found.facts)
    told = processes.gathered({module: one.facts for module, one in solved.items()})
    for job in jobs:
        module, owner = job.slot.module, owners[job.slot.module]
        specs = job.format.tensors(job.slot.rows, job.slot.cols)
        tensors = {}
        for name, spec in specs.items():
            own = solved[module].tensors[name] if module in solved else spec.empty()
            tensors[name] = own.to(device).contiguous()
            processes.spread(tensors[name], owner)
        solved.pop(module, None)
        yield job, Solution(tensors, told[owner][module])


def deal(jobs: Sequence[Job], seen: Mapping[str, Seen], count: int) -> dict[str, int]:
    """The process that solves each matrix, by module."""
    groups: dict[tuple[object, ...], list[Job]] = {}
    for job in jobs:
        mine = seen.get(job.slot.module, {})
        key = (*map(id, mine.values()), job.algorithm, job.format) if mine else (job.slot.module,)
        groups.setdefault(key, []).append(job)
    together = list(groups.values())
    if len(together) < count:
        together = [[job] for job in jobs]
    loads = [0] * count
    found: dict[str, int] = {}
    for group in sorted(together, key=lambda group: -_cost(group, seen)):
        least = loads.index(min(loads))
        loads[least] += _cost(group, seen)
        found |= {job.slot.module: least for job in group}
    return found


def _cost(group: Sequence[Job], seen: Mapping[str, Seen]) -> int:
    """Work of solving matrices from one set of statistics, in products of numbers."""
    first = group[0].slot
    correlates = any(cls.correlates for cls in seen.get(first.module, {}))
    weights = sum(job.slot.rows * job.slot.cols for job in group)
    return weights * first.cols + first.cols**3 if correlates else weights
