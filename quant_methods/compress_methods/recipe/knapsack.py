"""knapsack: one choice for every group, the least sum of errors in a number of bytes.

`greedy` starts with the smallest choices and buys the most error per byte (steepest edge of every
lower convex hull) until nothing more fits: exact but for the last step (Everett, 1963). `exact`
closes that gap. With the price per byte l at which the greedy choice stopped, no way to complete a
partial choice of error e and b bytes costs less than

    e + l b + (sum over the other groups of min (error + l bytes)) - l budget,

so a partial choice for which that exceeds the greedy result is dropped, as is one that another
beats in error and bytes (Pisinger, 1995, with dominance in place of a core). Few are ever left.

Needs no torch: the planner asks it too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

ROUNDING = 1e-9
Table = Sequence[Sequence[float]]
Sizes = Sequence[Sequence[int]]


def greedy(errors: Table, sizes: Sizes, budget: int) -> list[int]:
    """Index of the choice of every group. `sizes` rise within a group; the smallest choices must
    fit `budget`."""
    return _greedy(errors, sizes, budget)[0]


def exact(errors: Table, sizes: Sizes, budget: int) -> list[int]:
    """The same with the least sum of errors there is, choices of a group in any order."""
    orders = [_rising(e, s) for e, s in zip(errors, sizes, strict=True)]
    e = [[row[i] for i in order] for row, order in zip(errors, orders, strict=True)]
    s = [[row[i] for i in order] for row, order in zip(sizes, orders, strict=True)]
    start, price = _greedy(e, s, budget)
    found = start if price == 0 else _improve(e, s, budget, start, price)
    return [order[i] for order, i in zip(orders, found, strict=True)]


def total(errors: Table, chosen: Sequence[int]) -> float:
    """Sum of the errors of a choice."""
    return sum(row[i] for row, i in zip(errors, chosen, strict=True))


def _rising(errors: Sequence[float], sizes: Sequence[int]) -> list[int]:
    """Choices in order of size; of one size the best."""
    order: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: (sizes[i], errors[i])):
        if not order or sizes[i] > sizes[order[-1]]:
            order.append(i)
    return order


def _greedy(errors: Table, sizes: Sizes, budget: int) -> tuple[list[int], float]:
    """The choice, and the price per byte of the first step that did not fit; 0 where all did."""
    left = budget - sum(s[0] for s in sizes)
    chosen = [0] * len(sizes)
    edges = sorted(
        (edge, group)
        for group, (e, s) in enumerate(zip(errors, sizes, strict=True))
        for edge in _edges(e, s)
    )
    closed = set()
    price = 0.0
    for (slope, _, end), group in edges:
        cost = sizes[group][end] - sizes[group][chosen[group]]
        if group not in closed and cost <= left:
            chosen[group], left = end, left - cost
        else:
            closed.add(group)
            price = price or -slope
    return chosen, price


def _edges(errors: Sequence[float], sizes: Sequence[int]) -> Iterator[tuple[float, int, int]]:
    """(slope, start, end) of the lower convex hull of error over bytes, steepest first.

    Choices on one line, but for rounding, are edges of their own: a whole line may not fit.
    """
    start, last = 0, -math.inf
    while start < len(sizes) - 1:
        slopes = [
            ((errors[end] - errors[start]) / (sizes[end] - sizes[start]), end)
            for end in range(start + 1, len(sizes))
        ]
        steepest = min(slopes)[0]
        if steepest >= 0:
            return
        end = next(end for slope, end in slopes if slope <= steepest * (1 - ROUNDING))
        last = max(last, steepest)
        yield last, start, end
        start = end


def _improve(errors: Table, sizes: Sizes, budget: int, start: list[int], price: float) -> list[int]:
    """The best choice, by partial choices group after group; `start` where none beats it."""
    most = total(errors, start)
    cheapest = [
        min(e + price * s for e, s in zip(*group, strict=True))
        for group in zip(errors, sizes, strict=True)
    ]
    rest, least = sum(cheapest) - price * budget, sum(s[0] for s in sizes)
    # (bytes, error, last choice, what was chosen before)
    states: list[tuple[int, float, int, Any]] = [(0, 0.0, -1, None)]
    for group, (e, s) in enumerate(zip(errors, sizes, strict=True)):
        rest, least = rest - cheapest[group], least - s[0]
        grown = sorted(
            (
                (state[0] + size, state[1] + error, i, state)
                for state in states
                for i, (error, size) in enumerate(zip(e, s, strict=True))
                if state[0] + size + least <= budget
                and state[1] + error + price * (state[0] + size) + rest < most
            ),
            key=lambda state: state[:3],
        )
        states, best = [], math.inf
        for state in grown:
            if state[1] < best:
                states.append(state)
                best = state[1]
        if not states:
            return start
    found, state = [], min(states, key=lambda state: state[1])
    while state[3] is not None:
        found.append(state[2])
        state = state[3]
    return min(start, found[::-1], key=lambda chosen: total(errors, chosen))
