"""One line of progress with the time left for the whole job.

On a terminal the line updates in place. Elsewhere (a log file, CI) a plain line appears about every
ten seconds. The estimate assumes that every unit of work takes equally long, so choose units that
do (tokens, bytes of weights, layers), and gives no time before the first one is done.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TextIO

REDRAW = 0.1
PLAIN_INTERVAL = 10.0
CLEAR_LINE = "\r\x1b[K"


class Progress:
    """Reports how much of `total` units is done, to `stream` (standard error unless given).

    `done` units were finished by an earlier run: they count towards the total, not the speed.
    `total` may be set later, before the first `step`. Use as a context manager, or call `close`.
    """

    def __init__(
        self,
        total: float,
        label: str,
        stream: TextIO | None = None,
        *,
        done: float = 0,
        quiet: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total = total
        self.label = label
        self.done = done
        self._first = done
        self._stream = sys.stderr if stream is None else stream
        self._terminal = self._stream.isatty()
        self._quiet = quiet
        self._clock = clock
        self._started = self._printed = clock()
        self._drawn = False
        self._closed = False

    def step(self, n: float = 1, note: str = "") -> None:
        """Count `n` more units as done; `note` says what they were, such as a layer's name."""
        self.done += n
        now = self._clock()
        due = REDRAW if self._terminal else PLAIN_INTERVAL
        fresh = self._terminal and not self._drawn
        if not self._quiet and (fresh or now - self._printed >= due):
            self._print(now, note)

    def skip(self, n: float) -> None:
        """Count `n` units as done by an earlier run."""
        self.done += n
        self._first += n

    def eta(self) -> float | None:
        """Seconds left at the speed so far; None before any work is done."""
        worked = self.done - self._first
        if worked <= 0:
            return None
        return (self._clock() - self._started) / worked * max(0, self.total - self.done)

    def close(self) -> None:
        """Replace the line by a last one that says how long it took. Harmless when repeated."""
        if self._closed or self._quiet:
            return
        self._closed = True
        elapsed = duration(self._clock() - self._started)
        state = "done in" if self.done >= self.total else f"stopped at {self._percent()} after"
        self._write(f"{self.label}: {state} {elapsed}", end="\n")

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()

    def _percent(self) -> str:
        return f"{100 * self.done / self.total if self.total else 0:.0f}%"

    def _print(self, now: float, note: str) -> None:
        self._printed = now
        left = self.eta()
        parts = [f"{self.label}: {self._percent()}"]
        if left is not None:
            parts.append(f"{duration(left)} left")
        if note:
            parts.append(note)
        self._write(", ".join(parts), end="" if self._terminal else "\n")

    def _write(self, line: str, end: str) -> None:
        self._drawn = True
        self._stream.write((CLEAR_LINE if self._terminal else "") + line + end)
        self._stream.flush()


def duration(seconds: float) -> str:
    """`8 s`, `3 min 20 s` or `2 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def size_text(size: int) -> str:
    """`12.3 KiB`, `4.5 MiB` or `6.78 GiB`."""
    if size < 2**20:
        return f"{size / 2**10:.1f} KiB"
    return f"{size / 2**20:.1f} MiB" if size < 2**30 else f"{size / 2**30:.2f} GiB"
