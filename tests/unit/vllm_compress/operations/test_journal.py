"""A journal goes on where it was killed, and says what another run asks otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest

from compress_methods.errors import OutputError
from vllm_compress.operations.journal import JOURNAL, Journal


def test_a_journal_goes_on_behind_every_byte_that_a_kill_may_leave(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with Journal(folder, {"style": "icl"}, durable=True) as journal:
        journal.record("asked", 1, text="one")
    whole = (folder / JOURNAL).read_bytes()
    for size in range(len(whole) + 1):
        (folder / JOURNAL).write_bytes(whole[:size])
        with Journal(folder, {"style": "icl"}) as journal:
            assert journal.done("asked", 1) == (size == len(whole))
            journal.record("asked", 2, text="two")
        with Journal(folder, {"style": "icl"}) as journal:
            assert journal.done("asked", 2)


def test_an_error_names_what_differs(tmp_path: Path) -> None:
    with Journal(tmp_path / "run", {"style": "icl", "model": "m", "seed": 0}) as journal:
        journal.record("asked", 1)
    with pytest.raises(OutputError, match="of other style and model; choose"):
        Journal(tmp_path / "run", {"style": "cot", "model": "n", "seed": 0})


def test_what_is_no_journal_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / JOURNAL).write_text("mine")
    with pytest.raises(OutputError, match="holds a comparison of other"):
        Journal(tmp_path, "x")
    assert (tmp_path / JOURNAL).read_text() == "mine"
