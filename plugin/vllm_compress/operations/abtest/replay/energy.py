"""What the devices of both servers used while prompts were answered, as their /metrics count it.

Both are read when a replay begins, every `PERIOD_SECONDS` and when it ends; what lies between two
readings is a block, of A and of B at the same time. Servers count once a second, so blocks are long
against that. A block is kept only where no counter fell: a server that was started again begins
anew. Energy is that of whole devices, other work and idle time included, and all of it is put on
generated tokens: compare deployments by it under the load they are for (`--rate`). One at a time,
each server waits half of the time, and that is in it too.

Fails where: servers export no energy (not ours, or nothing to read there), or share a device, whose
energy is then of both. There is no row then, or one that says so. Two containers on a host that go
by addresses of their own look like two hosts: both then have the energy of all.
"""

from __future__ import annotations

import socket
import threading
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from types import TracebackType
from typing import Any

import httpx
import numpy as np

from compress_methods.evaluation.statistics import Array, Estimate, ratio_of_rates
from compress_methods.system.http import HttpError, headers
from vllm_compress.metrics.series import NAMES
from vllm_compress.operations.abtest.replay.client import Server
from vllm_compress.operations.abtest.replay.measure import Measurement
from vllm_compress.operations.abtest.replay.replay import ANSWERS, Pair
from vllm_compress.operations.abtest.scoring.judge import LEAST_PAIRS
from vllm_compress.operations.journal import Journal
from vllm_compress.operations.prometheus import scrape

ENERGY = "energy"
METRIC = "joules"
SHARED = "both use the same devices"
PERIOD_SECONDS = 5.0


@dataclass(frozen=True)
class Reading:
    """Joules by device, and tokens generated, since a server began to count."""

    joules: Mapping[str, float]
    tokens: float


def read_energy(server: Server) -> Reading | None:
    """Read the counters of a server; None where it has none, or does not answer."""
    try:
        samples = scrape(server.url, headers=headers())
    except (HttpError, ValueError):
        return None
    joules: dict[str, float] = defaultdict(float)
    tokens = 0.0
    for sample in samples:
        if sample.name == NAMES.energy:
            joules[sample.labels["device"]] += sample.value
        elif sample.name == NAMES.generation_tokens:
            tokens += sample.value
    return Reading(dict(joules), tokens) if joules else None


class EnergyLog:
    """Reads both servers while its block runs, and journals what was used at its end, also where
    the replay failed after some answers. Does nothing where one of them counts no energy."""

    def __init__(self, pair: Pair, journal: Journal) -> None:
        self.pair, self.journal = pair, journal
        self.readings: list[tuple[Reading | None, Reading | None]] = []
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="energy", daemon=True)

    def __enter__(self) -> EnergyLog:
        self._read()
        if None not in self.readings[0]:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if not self._thread.is_alive():
            return
        self._end.set()
        self._thread.join()
        self._read()
        if not self.journal.records.get(ANSWERS):
            return
        recorded = len(self.journal.records.get(ENERGY, {}))
        for before, now in zip(self.readings, self.readings[1:], strict=False):
            sides = [_used(*both) for both in zip(before, now, strict=True)]
            if None not in sides:
                used = dict(zip("ab", sides, strict=True))
                self.journal.record(ENERGY, recorded, **used)
                recorded += 1

    def _read(self) -> None:
        a, b = (read_energy(server) for server in self.pair)
        self.readings.append((a, b))

    def _follow(self) -> None:
        while not self._end.wait(PERIOD_SECONDS):
            self._read()


def _used(before: Reading | None, now: Reading | None) -> dict[str, Any] | None:
    """What lies between two readings, as a `Reading`; None where it cannot be told."""
    if before is None or now is None or before.joules.keys() - now.joules.keys():
        return None
    # A device that is counted from now on had not used anything before.
    joules = {
        device: value - before.joules.get(device, 0.0) for device, value in now.joules.items()
    }
    tokens = now.tokens - before.tokens
    if min(tokens, *joules.values()) < 0:
        return None
    return asdict(Reading(joules, tokens))


def measure_energy(
    pair: Pair, records: Mapping[str, Mapping[str, Any]], confidence: float
) -> list[Measurement]:
    """Joules per generated token of both: one row, or none where they were not counted."""
    lines = list(records.get(ENERGY, {}).values())
    if not lines:
        return []
    a, b = ([Reading(**line[side]) for line in lines] for side in "ab")
    if _share_devices(pair, a[0], b[0]):
        return [Measurement(METRIC, None, None, SHARED)]
    sums = [_sums(blocks) for blocks in (a, b)]
    if any(tokens.sum() <= 0 or joules.sum() <= 0 for joules, tokens in sums):
        return []
    values = tuple(float(joules.sum() / tokens.sum()) for joules, tokens in sums)
    if len(lines) < LEAST_PAIRS:  # blocks are what varies, however many prompts are in them
        note = f"needs {LEAST_PAIRS * PERIOD_SECONDS:.0f} s of answers"
        return [Measurement(METRIC, (values[0], values[1]), None, note)]
    change = ratio_of_rates(sums[0], sums[1], confidence, serial=True)
    prompts = len(records.get(ANSWERS, {}))
    return [Measurement(METRIC, (values[0], values[1]), _by_prompts(change, prompts))]


def _by_prompts(change: Estimate, prompts: int) -> Estimate:
    """An estimate of blocks as one of the prompts in them, which is what more can be had of."""
    blocks = change.n / prompts
    return replace(
        change, n=prompts, standard_error=lambda pairs: change.standard_error(pairs * blocks)
    )


def _sums(blocks: list[Reading]) -> tuple[Array, Array]:
    """Joules of all devices and tokens, by block."""
    joules = np.array([sum(block.joules.values()) for block in blocks])
    return joules, np.array([block.tokens for block in blocks])


def _share_devices(pair: Pair, a: Reading, b: Reading) -> bool:
    one, other = (_addresses(httpx.URL(server.url).host) for server in pair)
    return not (one.isdisjoint(other) or a.joules.keys().isdisjoint(b.joules))


def _addresses(host: str) -> set[str]:
    """What a host's name stands for, and the name."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        found = []
    return {host, *(str(address[0]) for *_, address in found)}
