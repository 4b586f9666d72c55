"""Files that users write, mutated 2,000 times a reader: a value or one line comes out, in time."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.robustness.outcomes import Outcome
from tests.robustness.user_files import READERS, try_files

INPUTS = 2000


@pytest.mark.parametrize("reader", READERS)
def test_a_mutated_file_is_a_value_or_one_line(reader: str, tmp_path: Path) -> None:
    tally = try_files(reader, INPUTS, tmp_path)
    assert tally.faults == []
    assert tally.tried == INPUTS
    assert tally.counts[Outcome.CLEAR] > INPUTS / 10
