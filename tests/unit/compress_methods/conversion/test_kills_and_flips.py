"""Killed at any moment or damaged in 2,000 places, a result has the same bytes or is refused.
`python -m tests.robustness` kills six times as often."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.robustness.flips import try_flips
from tests.robustness.kills import try_kills
from tests.robustness.outcomes import Outcome

KILLS, FLIPS = 20, 2000


@pytest.mark.slow
def test_no_kill_changes_the_result(tmp_path: Path) -> None:
    tally = try_kills(KILLS, tmp_path, random.Random(0))
    assert tally.faults == []
    assert tally.counts[Outcome.VALUE] == tally.tried == KILLS


@pytest.mark.slow
def test_every_flipped_bit_is_named(tmp_path: Path) -> None:
    tally = try_flips(FLIPS, tmp_path, random.Random(0))
    assert tally.faults == []
    assert tally.tried == FLIPS
    assert tally.counts[Outcome.CLEAR] > FLIPS * 0.99
