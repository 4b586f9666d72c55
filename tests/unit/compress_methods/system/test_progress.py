"""Progress says how far and how long, without flooding a log."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import struct
import termios
import threading

import pytest

from compress_methods.system.progress import Progress


class Clock:
    """Time that passes only when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def lines(self) -> list[str]:
        """Everything that was ever drawn, one over the other."""
        return [line.rstrip(" ") for line in self.getvalue().split("\r") if line.strip(" ")]

    def screen(self) -> str:
        """What is left to see."""
        shown = ""
        for line in self.getvalue().split("\r"):
            shown = line + shown[len(line) :]
        return shown


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr("tqdm.std.time", found)
    return found


def test_a_log_gets_a_line_every_ten_seconds(clock: Clock) -> None:
    out = io.StringIO()
    with Progress(100, "work", out) as progress:
        for _ in range(100):
            clock.now += 0.5
            progress.step(1, "layer")
    assert out.getvalue().splitlines() == [
        "work: 20%, 00:40 left, layer",
        "work: 40%, 00:30 left, layer",
        "work: 60%, 00:20 left, layer",
        "work: 80%, 00:10 left, layer",
        "work: 100%, 00:00 left, layer",
        "work: done in 50 s",
    ]


def test_short_work_leaves_one_line_in_a_log(clock: Clock) -> None:
    out = io.StringIO()
    with Progress(10, "work", out) as progress:
        for _ in range(10):
            clock.now += 0.5
            progress.step()
    assert out.getvalue() == "work: done in 5 s\n"


def test_a_terminal_gets_one_line_that_changes(clock: Clock) -> None:
    out = Terminal()
    with Progress(4, "work", out) as progress:
        for layer in ("a", "longer", "b", ""):
            clock.now += 1
            progress.step(1, layer)
    assert out.lines() == [
        "work: 0%, ? left",
        "work: 25%, 00:03 left, a",
        "work: 50%, 00:02 left, longer",
        "work: 75%, 00:01 left, b",
        "work: 100%, 00:00 left",
        "work: done in 4 s\n",
    ]
    assert out.getvalue().count("\n") == 1
    assert out.screen().rstrip(" ") == "work: done in 4 s\n"


def test_a_terminal_is_not_redrawn_faster_than_one_can_read(clock: Clock) -> None:
    out = Terminal()
    with Progress(1000, "work", out) as progress:
        for _ in range(1000):
            clock.now += 0.001
            progress.step()
    assert 10 <= len(out.lines()) <= 13


def test_a_line_is_cut_to_the_terminal(clock: Clock) -> None:
    """A line that wrapped would leave its first part behind when it is drawn again."""
    screen, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 30, 0, 0))
    with open(terminal, "w") as out, Progress(2, "work", out) as progress:
        clock.now += 1
        progress.step(1, 50 * "x")
    drawn = b""
    with open(screen, "rb", buffering=0) as shown, contextlib.suppress(OSError):  # at its end
        while piece := shown.read(4096):
            drawn += piece
    redrawn = drawn.decode().split("\r")[2]
    assert redrawn == "work: 50%, 00:01 left, xxxxxx"
    assert len(redrawn) == 29


def test_earlier_work_counts_as_done_but_not_as_speed(clock: Clock) -> None:
    """90 of 200 are earlier work; 10 in 10 s leave 100 to do at one a second."""
    out = io.StringIO()
    with Progress(200, "work", out, done=80) as progress:
        progress.skip(10)
        clock.now += 10
        progress.step(10)
        assert progress.done == 100
    assert out.getvalue().splitlines()[0] == "work: 50%, 01:40 left"


def test_no_time_is_promised_before_work_is_done(clock: Clock) -> None:
    out = io.StringIO()
    with Progress(200, "work", out, done=100) as progress:
        clock.now += 10
        progress.step(0)
    assert out.getvalue().splitlines()[0] == "work: 50%, ? left"


def test_the_total_may_come_later(clock: Clock) -> None:
    out = io.StringIO()
    with Progress(1, "work", out) as progress:
        progress.total = 40
        clock.now += 10
        progress.step(10)
    assert out.getvalue().splitlines() == [
        "work: 25%, 00:30 left",
        "work: stopped at 25% after 10 s",
    ]


def test_more_than_was_announced_is_all_of_it(clock: Clock) -> None:
    out = io.StringIO()
    with Progress(10, "work", out) as progress:
        clock.now += 10
        progress.step(15)
    assert out.getvalue().splitlines() == ["work: 100%, 00:00 left", "work: done in 10 s"]


def test_work_that_ends_early_leaves_a_line_that_says_how_far_it_got(clock: Clock) -> None:
    out = io.StringIO()
    with contextlib.suppress(RuntimeError), Progress(4, "work", out) as progress:
        clock.now += 3
        progress.step()
        raise RuntimeError
    progress.close()
    assert out.getvalue() == "work: stopped at 25% after 3 s\n"


def test_a_line_inside_another_stays_a_line(clock: Clock) -> None:
    out = io.StringIO()
    with Progress(2, "outer", out) as outer:
        with Progress(2, "inner", out) as inner:
            clock.now += 10
            inner.step()
        outer.step()
    assert out.getvalue().splitlines() == [
        "inner: 50%, 00:10 left",
        "inner: stopped at 50% after 10 s",
        "outer: 50%, 00:10 left",
        "outer: stopped at 50% after 10 s",
    ]


def test_quiet_prints_nothing_but_counts(clock: Clock) -> None:
    out = Terminal()
    with Progress(3, "work", out, quiet=True) as progress:
        clock.now += 60
        progress.skip(1)
        progress.step(2)
    assert progress.done == progress.total == 3
    assert out.getvalue() == ""


def test_nothing_to_do_is_no_error(clock: Clock) -> None:
    out = io.StringIO()
    with Progress(0, "work", out) as progress:
        progress.step(0)
    assert out.getvalue() == "work: done in 0 s\n"


def test_no_thread_is_left_behind() -> None:
    before = threading.active_count()
    with Progress(2, "work", io.StringIO()) as progress:
        progress.step()
        assert threading.active_count() == before
