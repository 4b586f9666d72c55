"""Requests as they were: a trace of arrivals with their lengths, in one of three published forms.

    Mooncake   .jsonl: timestamp (milliseconds), input_length, output_length, hash_ids (FAST 2025)
    Azure      .csv: TIMESTAMP, ContextTokens, GeneratedTokens (Splitwise 2023, DynamoLLM 2024)
    guidellm   .json: the report of one benchmark, with its requests

Requests go to replicas in turn, as a balancer that sees all alike hands them out. Those of one
moment are spread evenly up to the next one: Mooncake's clock ticks every three seconds, and users
do not. A trace longer than a simulation is judged by its busiest stretch, so that a plan holds at
the peak it has seen.

Fails where: a trace is shorter than what it should say of the day (an hour knows no night), answers
were slow when it was recorded by clients who waited for them, or the file has a sample of the
requests, as guidellm's may: its rate is too low then.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from compress_methods.errors import CompressError, named
from compress_methods.system.user_file import csv_rows, read_json_value
from vllm_compress.operations.capacity.throughput.load import Arrival

AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
MOONCAKE = ("timestamp", "input_length", "output_length")
GUIDELLM = ("request_start_time", "prompt_tokens", "output_tokens")
LEAST, MOST = 20, 1_000_000
MOST_TOKENS = 10_000_000
FAR = 1e18
HASHES = "hash_ids"


class TraceError(CompressError):
    """A trace that cannot be read, or is too short to plan by."""


@dataclass(frozen=True)
class Trace:
    """Arrivals in order, the first at 0. `shared` is the share of prompt tokens in blocks that an
    earlier prompt began with, so the most that a prefix cache could find; None where not told."""

    name: str
    arrivals: tuple[Arrival, ...]
    shared: float | None = None

    @property
    def rate(self) -> float:
        """Requests per second on average."""
        return (len(self.arrivals) - 1) / self.arrivals[-1].sent

    @property
    def longest(self) -> int:
        """Tokens of the longest request."""
        return max(a.prompt + a.output for a in self.arrivals)

    @property
    def means(self) -> tuple[int, int]:
        """Tokens of a prompt and of an answer on average, from 1."""
        n = len(self.arrivals)
        prompts, outputs = (sum(a[i] for a in self.arrivals) for i in (1, 2))
        return max(1, round(prompts / n)), max(1, round(outputs / n))

    @cached_property
    def _prompts(self) -> list[int]:
        return sorted(a.prompt for a in self.arrivals)

    def prompt_at(self, share: float) -> int:
        """The length that a share (0 to 1) of prompts does not exceed."""
        return self._prompts[min(int(share * len(self._prompts)), len(self._prompts) - 1)]

    def at_rate(self, rate: float) -> Trace:
        """The same requests, sooner or later after each other."""
        scale = self.rate / rate
        return replace(self, arrivals=tuple(a._replace(sent=a.sent * scale) for a in self.arrivals))

    def turns(self, engines: int, first: int, most: int) -> tuple[Arrival, ...]:
        """What one of several engines gets, from 0 on: the stretch of `most` requests that takes
        the least time."""
        mine = self.arrivals[first::engines]
        if len(mine) > most:
            ends = range(most - 1, len(mine))
            last = min(ends, key=lambda i: mine[i].sent - mine[i - most + 1].sent)
            mine = mine[last - most + 1 : last + 1]
        return tuple(a._replace(sent=a.sent - mine[0].sent) for a in mine)


def read_trace(path: Path) -> Trace:
    """Read a trace by the ending of its name; raises `TraceError` naming file, line and key."""
    readers: dict[str, Callable[[Path], Iterator[tuple[str, Arrival, Any]]]] = {
        ".jsonl": _mooncake,
        ".csv": _azure,
        ".json": _guidellm,
    }
    if path.suffix not in readers:
        raise TraceError(
            f"{path}: ends in {path.suffix or 'nothing'!r}, expected {', '.join(readers)}"
        )
    if not path.is_file():
        raise TraceError(f"{path}: no such file")
    try:
        rows = list(islice(readers[path.suffix](path), MOST + 1))
    except OSError as problem:
        raise TraceError(named(problem, path)) from problem
    if not LEAST <= len(rows) <= MOST:
        found = f"{len(rows)} requests" if len(rows) < LEAST else "more requests"
        raise TraceError(f"{path}: {found}, expected {LEAST} to {MOST:,}")
    rows.sort(key=lambda row: row[1].sent)
    start = rows[0][1].sent
    if rows[-1][1].sent <= start:
        raise TraceError(f"{path}: all requests are of one moment, expected their times")
    arrivals = [a._replace(sent=a.sent - start) for _, a, _ in rows]
    return Trace(path.name, tuple(_spread(arrivals)), _shared(rows))


def _spread(arrivals: list[Arrival]) -> Iterator[Arrival]:
    """Requests of one moment, evenly up to the next one; the last as far apart as those before."""
    moments = [(sent, list(group)) for sent, group in groupby(arrivals, key=lambda a: a.sent)]
    ends = [sent for sent, _ in moments[1:]]
    ends.append(2 * moments[-1][0] - moments[-2][0])
    for (sent, group), end in zip(moments, ends, strict=True):
        for i, arrival in enumerate(group):
            yield arrival._replace(sent=sent + (end - sent) * i / len(group))


def _mooncake(path: Path) -> Iterator[tuple[str, Arrival, Any]]:
    # Here, because it imports torch, which takes longer than a plan without a trace.
    from compress_methods.calibration.text import jsonl_rows

    for where, row in jsonl_rows(path):
        if not isinstance(row, Mapping):
            raise TraceError(f"{where}: expected an object, found {type(row).__name__}")
        hashes = row.get(HASHES)
        if hashes is not None and not isinstance(hashes, list):
            raise TraceError(f"{where}: {HASHES} is {hashes!r:.80}, expected a list")
        yield where, _arrival(row, MOONCAKE, where, 1e-3), hashes


def _azure(path: Path) -> Iterator[tuple[str, Arrival, Any]]:
    for where, row in csv_rows(path, TraceError):
        values: dict[str, Any] = {key: _whole(row.get(key)) for key in AZURE[1:]}
        values[AZURE[0]] = _moment(row.get(AZURE[0]), where)
        yield where, _arrival(values, AZURE, where), None


def _moment(text: str | None, where: str) -> float:
    """Seconds since 1970; datasets have seven digits of a second, of which Python reads six."""
    cut = re.sub(r"(\.\d{6})\d+", r"\1", text or "")
    try:
        moment = datetime.fromisoformat(cut)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError, OSError):
        raise TraceError(f"{where}: {AZURE[0]} is {text!r:.80}, expected a date and time") from None


def _whole(text: str | None) -> object:
    return int(text) if text is not None and text.strip().isdecimal() and len(text) < 20 else text


def _guidellm(path: Path) -> Iterator[tuple[str, Arrival, Any]]:
    report = read_json_value(path, TraceError)
    found = report.get("benchmarks") if isinstance(report, dict) else None
    if not isinstance(found, list) or len(found) != 1 or not isinstance(found[0], dict):
        many = f"{len(found)} benchmarks" if isinstance(found, list) else "no `benchmarks`"
        raise TraceError(f"{path}: {many}, expected a guidellm report of one benchmark")
    requests = found[0].get("requests")
    rows = requests.get("successful") if isinstance(requests, dict) else None
    if not isinstance(rows, list):
        raise TraceError(f"{path}: benchmarks[0].requests.successful is not a list of requests")
    for i, row in enumerate(rows):
        where = f"{path}: benchmarks[0].requests.successful[{i}]"
        if not isinstance(row, dict):
            raise TraceError(f"{where}: expected an object, found {type(row).__name__}")
        yield where, _arrival(row, GUIDELLM, where), None


def _arrival(
    row: Mapping[str, Any], names: tuple[str, str, str], where: str, unit: float = 1.0
) -> Arrival:
    """The request of a row, whose times are in `unit` seconds. An answer has a token at least."""
    sent, prompt, output = (row.get(name) for name in names)
    if isinstance(sent, bool) or not isinstance(sent, int | float) or not abs(sent) < FAR:
        raise TraceError(f"{where}: {names[0]} is {sent!r:.80}, expected a time as a number")
    tokens = []
    for name, value, least in ((names[1], prompt, 1), (names[2], output, 0)):
        if type(value) is not int or not least <= value <= MOST_TOKENS:
            raise TraceError(f"{where}: {name} is {value!r:.80}, expected tokens from {least}")
        tokens.append(max(1, value))
    return Arrival(sent * unit, *tokens)


def _shared(rows: list[tuple[str, Arrival, Any]]) -> float | None:
    """The share of prompt tokens whose blocks, and all before them, an earlier prompt had."""
    if any(hashes is None for _, _, hashes in rows):
        return None
    seen: set[Any] = set()
    found = total = 0.0
    for where, arrival, hashes in rows:
        try:
            known = next((i for i, each in enumerate(hashes) if each not in seen), len(hashes))
            seen.update(hashes)
        except TypeError:
            raise TraceError(f"{where}: {HASHES} is not a list of numbers") from None
        found += arrival.prompt * known / len(hashes) if hashes else 0.0
        total += arrival.prompt
    return found / total
