"""Progress says how far and how long, without flooding a log."""

from __future__ import annotations

import io

import pytest

from compress_methods.progress import CLEAR_LINE, Progress, duration, size_text


class Clock:
    """Time that passes only when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_log_gets_a_line_every_ten_seconds(clock: Clock) -> None:
    out = io.StringIO()
    with Progress(100, "work", out, clock=clock) as progress:
        for _ in range(100):
            clock.now += 0.5
            progress.step(1, "layer")
    assert out.getvalue().splitlines() == [
        "work: 20%, 40 s left, layer",
        "work: 40%, 30 s left, layer",
        "work: 60%, 20 s left, layer",
        "work: 80%, 10 s left, layer",
        "work: 100%, 0 s left, layer",
        "work: done in 50 s",
    ]


def test_a_terminal_gets_one_line_that_changes(clock: Clock) -> None:
    out = Terminal()
    with Progress(10, "work", out, clock=clock) as progress:
        for _ in range(10):
            clock.now += 1
            progress.step()
    assert out.getvalue().count("\n") == 1
    assert out.getvalue().count(CLEAR_LINE) == 11
    assert out.getvalue().endswith(f"{CLEAR_LINE}work: done in 10 s\n")


def test_a_terminal_is_not_redrawn_faster_than_one_can_read(clock: Clock) -> None:
    out = Terminal()
    progress = Progress(1000, "work", out, clock=clock)
    for _ in range(1000):
        clock.now += 0.001
        progress.step()
    assert out.getvalue().count(CLEAR_LINE) < 15


def test_earlier_work_counts_as_done_but_not_as_speed(clock: Clock) -> None:
    progress = Progress(100, "work", io.StringIO(), done=80, clock=clock)
    assert progress.eta() is None
    clock.now += 10
    progress.step(10)
    assert progress.eta() == pytest.approx(10)


def test_work_that_ends_early_leaves_a_line_that_says_how_far_it_got(clock: Clock) -> None:
    out = io.StringIO()
    with Progress(4, "work", out, clock=clock) as progress:
        clock.now += 3
        progress.step()
    assert out.getvalue() == "work: stopped at 25% after 3 s\n"


def test_quiet_prints_nothing(clock: Clock) -> None:
    out = Terminal()
    with Progress(2, "work", out, quiet=True, clock=clock) as progress:
        clock.now += 60
        progress.step(2)
    assert out.getvalue() == ""


def test_nothing_to_do_is_no_error(clock: Clock) -> None:
    out = io.StringIO()
    with Progress(0, "work", out, clock=clock) as progress:
        progress.step(0)
    assert out.getvalue() == "work: done in 0 s\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (200, "3 min 20 s"),
        (3599.6, "1 h 00 min"),
        (7500, "2 h 05 min"),
    ],
)
def test_durations_are_readable(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [(512, "0.5 KiB"), (2**20, "1.0 MiB"), (16785920, "16.0 MiB"), (3 * 2**29, "1.50 GiB")],
)
def test_sizes_are_readable(size: int, text: str) -> None:
    assert size_text(size) == text
