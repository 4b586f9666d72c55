"""A server's busy time is shared among the requests that overlap."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_compress.operations.abtest.replay.measure import busy_shares

requests = st.lists(st.tuples(st.floats(0, 100), st.floats(0.01, 20)), min_size=1, max_size=30)


@given(requests)
def test_shares_of_busy_time_add_up_to_it(found: list[tuple[float, float]]) -> None:
    starts, seconds = np.array(found).T
    shares = busy_shares(starts, starts + seconds)
    union, until = 0.0, -math.inf
    for start, length in sorted(found):
        union += max(0.0, start + length - max(start, until))
        until = max(until, start + length)
    assert shares.sum() == pytest.approx(union)
    assert (shares <= seconds + 1e-9).all()
    assert (shares > 0).all()


def test_requests_one_at_a_time_have_their_time_for_themselves() -> None:
    starts, seconds = np.array([0.0, 3.0, 10.0]), np.array([2.0, 4.0, 1.0])
    assert busy_shares(starts, starts + seconds) == pytest.approx(seconds)
