"""What is asked of a deployment: requests per second, their lengths, and latency objectives."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from compress_methods.errors import CompressError
from vllm_compress.operations.capacity.throughput.trace import Trace

PER_SECOND = {"s": 1.0, "sec": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0}
UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0}
METRICS = {"ttft": "time to first token", "tpot": "time per output token"}


class DemandError(CompressError):
    """A rate, length or objective that cannot be read."""


@dataclass(frozen=True)
class Objective:
    """A share (0 to 1) of requests stays below `seconds`. `metric` is `ttft` or `tpot`."""

    metric: str
    share: float
    seconds: float

    def __str__(self) -> str:
        return f"{self.metric} p{100 * self.share:g} < {duration(self.seconds)}"


@dataclass(frozen=True)
class Demand:
    """Requests of `prompt` + `output` tokens at `rate` per second; `context` must be possible.

    `cached` is the share of a prompt's tokens that a prefix cache has. With a `trace` it is asked
    for those requests, and rate and lengths are its means.
    """

    rate: float
    prompt: int
    output: int
    context: int
    objectives: tuple[Objective, ...]
    cached: float = 0.0
    trace: Trace | None = None

    def limit(self, metric: str) -> float:
        """The strictest bound on a metric, infinity without one."""
        bounds = [o.seconds for o in self.objectives if o.metric == metric]
        return min(bounds, default=float("inf"))

    def at_rate(self, rate: float) -> Demand:
        """The same requests, more or fewer of them a second."""
        trace = None if self.trace is None else self.trace.at_rate(rate)
        return replace(self, rate=rate, trace=trace)

    def prompt_at(self, share: float) -> int:
        """The length that a share (0 to 1) of prompts does not exceed."""
        return self.prompt if self.trace is None else self.trace.prompt_at(share)


def parse_rate(text: str) -> float:
    """Parse requests per second from `20/s`, `300/min` or `20`; raises `DemandError`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:/\s*(\w+))?\s*", text)
    if match and (match[2] or "s") in PER_SECOND and float(match[1]) > 0:
        return float(match[1]) / PER_SECOND[match[2] or "s"]
    raise DemandError(f"--rate is {text!r}, expected requests per time such as 20/s or 300/min")


def parse_share(text: str, option: str = "--prefix-cached") -> float:
    """Parse `40%` or `0.4`, of the prompts' tokens or others; raises `DemandError`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%?)\s*", text)
    share = float(match[1]) / (100 if match[2] else 1) if match else -1.0
    if 0 <= share < 1:
        return share
    raise DemandError(f"{option} is {text!r}, expected a share below 1 such as 40% or 0.4")


def parse_objective(metric: str, text: str) -> Objective:
    """Parse `p95<500ms`; raises `DemandError`."""
    match = re.fullmatch(r"\s*p(\d+(?:\.\d+)?)\s*<=?\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", text)
    if match and match[3] in UNITS and 0 < float(match[1]) < 100 and float(match[2]) > 0:
        return Objective(metric, float(match[1]) / 100, float(match[2]) * UNITS[match[3]])
    raise DemandError(
        f"--{metric} is {text!r}, expected a percentile and a bound such as 'p95<500ms'"
    )


def duration(seconds: float) -> str:
    """`480 ms`, `2.3 s`."""
    if seconds >= 99.5:
        return f"{seconds:,.0f} s"
    if seconds >= 0.9995:
        return f"{seconds:.3g} s"
    return f"{1e3 * seconds:.3g} ms"
