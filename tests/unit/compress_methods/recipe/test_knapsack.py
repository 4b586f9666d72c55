"""One choice for every group: the least sum of errors in a number of bytes."""

from __future__ import annotations

import random
import time
from itertools import product

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from compress_methods.recipe.knapsack import exact, greedy, total

choice = st.tuples(st.floats(0, 1, allow_subnormal=False), st.integers(1, 30))
tables = st.lists(st.lists(choice, min_size=1, max_size=4), min_size=1, max_size=5)


@given(tables, st.floats(0, 1.2))
@example([[(0.0, 1), (0.0, 6)], [(0.0, 9), (0.5, 1)], [(0.0, 14), (1.0, 1)]], 0.3125)
def test_exact_is_what_trying_everything_finds(
    table: list[list[tuple[float, int]]], share: float
) -> None:
    errors, sizes = ([[c[k] for c in row] for row in table] for k in (0, 1))
    least, most = (sum(f(row) for row in sizes) for f in (min, max))
    budget = least + int(share * (most - least))
    spent = [
        (total(errors, picked), picked)
        for picked in product(*(range(len(row)) for row in sizes))
        if total(sizes, picked) <= budget
    ]
    found = exact(errors, sizes, budget)  # type: ignore[arg-type]
    assert total(sizes, found) <= budget
    assert total(errors, found) == pytest.approx(min(spent)[0], abs=1e-9)


def test_exact_closes_the_gap_that_the_greedy_choice_leaves() -> None:
    errors = [[10.0, 0.0], [9.0, 0.0], [9.0, 0.0]]
    sizes = [[0, 6], [0, 5], [0, 5]]
    assert greedy(errors, sizes, 10) == [0, 1, 1]
    errors[0][0] = 11.0  # more per byte, but then only one fits
    assert greedy(errors, sizes, 10) == [1, 0, 0]
    assert exact(errors, sizes, 10) == [0, 1, 1]


def test_eighty_layers_are_chosen_for_in_a_moment() -> None:
    draw = random.Random(0)
    errors, sizes = [], []
    for _ in range(80):
        for shape in (80e6, 67e6, 470e6, 235e6):
            cost = draw.lognormvariate(0, 1) * shape
            bits = (2.125, 3.125, 4.125, 8.125)
            sizes.append([int(shape * b / 8) for b in bits])
            errors.append([cost * 4**-b for b in bits])
    budget = int(sum(row[0] for row in sizes) * 3.5 / 2.125)
    began = time.monotonic()
    found = exact(errors, sizes, budget)
    assert time.monotonic() - began < 10
    assert total(sizes, found) <= budget
    assert total(errors, found) <= total(errors, greedy(errors, sizes, budget))
