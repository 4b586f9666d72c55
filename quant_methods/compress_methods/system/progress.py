"""One line of progress with the time left for the whole job, drawn by tqdm.

On a terminal the line updates in place. Elsewhere (a log file, CI) a plain line appears about every
ten seconds. The estimate assumes that every unit of work takes equally long, so choose units that
do (tokens, bytes of weights, layers); before the first one is done it is `?`.
"""

from __future__ import annotations

import sys
from typing import TextIO

from tqdm import tqdm

from compress_methods.system.words import duration

REDRAW = 0.1
PLAIN_INTERVAL = 10.0
LINE = "{desc}: {percentage:.0f}%, {remaining} left{postfix}"


class Progress(tqdm):
    """Reports how much of `total` units is done, to `stream` (standard error unless given).

    `done` units were finished by an earlier run: they count towards the total, not the speed.
    `total` may be set later, before the first `step`. Use as a context manager, or call `close`.
    """

    total: float
    monitor_interval = 0  # no thread of tqdm's that watches for slow steps

    def __init__(
        self,
        total: float,
        label: str,
        stream: TextIO | None = None,
        *,
        done: float = 0,
        quiet: bool = False,
    ) -> None:
        self.done = self.initial = done
        self._stream = sys.stderr if stream is None else stream
        self._said: set[str] = set()
        terminal = self._stream.isatty()
        interval = REDRAW if terminal else PLAIN_INTERVAL
        super().__init__(
            total=total,
            desc=label,
            initial=done,
            disable=quiet,
            bar_format=LINE,
            file=self._stream if terminal else _Lines(self._stream),
            mininterval=interval,
            miniters=0,  # by time alone, not by a number of steps that it guesses
            delay=0 if terminal else interval,
            smoothing=0,  # the average speed so far: units vary from one to the next
            dynamic_ncols=terminal,
            position=0,
            leave=False,
        )

    def step(self, n: float = 1, note: str = "") -> None:
        """Count `n` more units as done; `note` says what they were, such as a layer's name."""
        self.done += n
        self.total = max(self.total, self.done)  # beyond its total tqdm gives no percentage
        self.set_postfix_str(note, refresh=False)
        self.update(n)

    def say(self, line: str) -> None:
        """Write a line that stays, the first time it is said."""
        if line not in self._said and not self.disable:
            self.clear()
            self._stream.write(f"{line}\n")
            self._stream.flush()
        self._said.add(line)

    def skip(self, n: float) -> None:
        """Count `n` units as done by an earlier run."""
        self.done += n
        self.n += n
        self.initial += n

    def close(self) -> None:
        """Replace the line by a last one that says how long it took. Harmless when repeated."""
        if self.disable:  # quiet, or closed
            return
        super().close()
        whole = self.done >= self.total
        state = "done in" if whole else f"stopped at {100 * self.done / self.total:.0f}% after"
        self._stream.write(f"{self.desc}: {state} {duration(self.format_dict['elapsed'])}\n")
        self._stream.flush()


class _Lines:
    """Gives a log a line of its own for every one that tqdm would draw over the last."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        if line := text.strip():
            self._stream.write(f"{line}\n")

    def flush(self) -> None:
        self._stream.flush()
