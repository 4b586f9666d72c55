"""Portions: everything once, in order, no more at a time than is allowed."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from compress_methods.system.portions import portions


@given(st.lists(st.integers(0, 20)), st.integers(0, 30))
def test_everything_comes_once_and_no_portion_could_take_the_next(
    sizes: list[int], limit: int
) -> None:
    found = list(portions(sizes, lambda size: size, limit))
    assert [size for portion in found for size in portion] == sizes
    assert all(len(portion) == 1 or sum(portion) <= limit for portion in found)
    assert all(sum(a) + b[0] > limit for a, b in pairwise(found))
