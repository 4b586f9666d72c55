"""The requests of a simulation: alike and at a rate, of clients who wait, or those of a trace."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Arrival(NamedTuple):
    """A request of `prompt` + `output` tokens, sent at a second."""

    sent: float
    prompt: int
    output: int


@dataclass(frozen=True)
class Load:
    """Requests of `prompt` + `output` tokens: `rate` per second, or `clients` who wait; or those of
    `trace`, in order. `cached` is the share of a prompt's tokens found in the prefix cache."""

    prompt: int
    output: int
    requests: int
    rate: float | None = None
    clients: int | None = None
    seed: int = 0
    cached: float = 0.0
    trace: tuple[Arrival, ...] = ()

    @property
    def longest(self) -> int:
        """Tokens of the longest request."""
        return max((a.prompt + a.output for a in self.trace), default=self.prompt + self.output)


def load_of(trace: tuple[Arrival, ...], cached: float = 0.0) -> Load:
    """A load of these arrivals."""
    return Load(0, 0, len(trace), cached=cached, trace=trace)


def cached_tokens(prompt: int, share: float) -> int:
    """Tokens of a prompt that are not computed: never its last one, which the answer needs."""
    return min(int(share * prompt), prompt - 1)
