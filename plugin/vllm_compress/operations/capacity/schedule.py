"""Replicas by the hour of a day, and what they cost: for an autoscaler, or a timetable.

Every hour gets the fewest replicas that meet the objectives at its rate, at least one, all of the
split that was chosen for the peak. An hour's replicas have to be there when it begins: start them
as much earlier as a model takes to load.

Fails where: rates move within an hour; give the highest of each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress_methods.errors import CompressError
from compress_methods.system.user_file import csv_rows, read_yaml
from vllm_compress.operations.capacity.footprint.storage import Scheme
from vllm_compress.operations.capacity.hardware import Hardware
from vllm_compress.operations.capacity.plan import Option, Planner
from vllm_compress.operations.capacity.search import Candidate, Search

HOURS = 24
COLUMNS = ("hour", "rate")


class ProfileError(CompressError):
    """An hourly load that cannot be read."""


@dataclass(frozen=True)
class Hour:
    """One hour: requests per second, what serves them, watts on average where known."""

    rate: float
    replicas: int
    devices: int
    watts: float | None


@dataclass(frozen=True)
class Schedule:
    """A day of an option; `price` is of a device-hour. `peak` devices would serve every hour."""

    scheme: str
    hardware: str
    hours: tuple[Hour, ...]
    peak: int
    price: float | None

    @property
    def device_hours(self) -> int:
        return sum(hour.devices for hour in self.hours)

    @property
    def kwh(self) -> float | None:
        """Energy of the day."""
        watts = [hour.watts for hour in self.hours if hour.watts is not None]
        return sum(watts) / 1e3 if len(watts) == len(self.hours) else None

    def to_dict(self) -> dict[str, Any]:
        """The `schedule` of --json; costs in the currency of the prices, null without one."""
        hours, always = self.device_hours, HOURS * self.peak
        return {
            "scheme": self.scheme,
            "hardware": self.hardware,
            "hours": [vars(hour) for hour in self.hours],
            "device_hours": hours,
            "device_hours_at_peak": always,
            "price_per_day": None if self.price is None else hours * self.price,
            "price_per_day_at_peak": None if self.price is None else always * self.price,
            "kwh_per_day": self.kwh,
        }


def read_profile(path: Path) -> list[float]:
    """Requests per second of 24 hours: a YAML list, or a .csv with `hour` (0 to 23) and `rate`;
    raises `ProfileError`."""
    found = _csv(path) if path.suffix == ".csv" else read_yaml(path, ProfileError)
    if not isinstance(found, list) or len(found) != HOURS:
        what = f"{len(found)} values" if isinstance(found, list) else f"{found!r:.80}"
        raise ProfileError(f"{path}: {what}, expected a list of {HOURS} rates, one an hour")
    for hour, rate in enumerate(found):
        number = isinstance(rate, int | float) and not isinstance(rate, bool)
        if not number or not 0 <= rate < math.inf:
            raise ProfileError(f"{path}: hour {hour} is {rate!r:.80}, expected requests per second")
    if not max(found):
        raise ProfileError(f"{path}: no hour has a request")
    return [float(rate) for rate in found]


def _csv(path: Path) -> list[Any]:
    """The rates of a .csv by hour; None for hours it lacks."""
    rates: list[Any] = [None] * HOURS
    for where, row in csv_rows(path, ProfileError):
        try:
            hour, rate = int(row["hour"]), float(row["rate"])
        except (KeyError, TypeError, ValueError):
            hour, rate = -1, 0.0
        if not 0 <= hour < HOURS or rates[hour] is not None:
            shown = ", ".join(f"{key} {row.get(key)!r:.40}" for key in COLUMNS)
            raise ProfileError(f"{where}: {shown}; expected hours from 0 to 23, once, and a rate")
        rates[hour] = rate
    return rates


def plan_day(
    planner: Planner, scheme: Scheme, machine: Hardware, option: Option, rates: Sequence[float]
) -> Schedule:
    """Fit an option that meets the peak to the rates (requests per second) of every hour."""
    (candidate,) = (
        c for c in planner.candidates(scheme, machine) if str(c.found.layout) == option.layout
    )
    found: dict[float, Hour] = {}
    for rate in set(rates):
        # A search may find more replicas for less; those of the peak do as well.
        replicas, busy = _fewest(planner, machine, candidate, rate) if rate else (1, 0.0)
        replicas = min(replicas, option.replicas)
        devices = replicas * candidate.devices
        watts = None
        if machine.watts is not None:
            watts = planner.power.watts(machine.watts, devices, busy)
        found[rate] = Hour(rate, replicas, devices, watts)
    hours = tuple(found[rate] for rate in rates)
    peak = max(hour.devices for hour in hours)
    return Schedule(option.scheme, option.hardware, hours, peak, machine.price_per_hour)


def _fewest(
    planner: Planner, machine: Hardware, candidate: Candidate, rate: float
) -> tuple[int, float]:
    """The fewest replicas that meet the objectives at a rate, and how busy they are."""
    search = Search(planner.demand.at_rate(rate), planner.adapted(machine), planner.seed)
    search.run([candidate])
    if search.best is None:
        raise ProfileError(f"{rate:g} requests/s: {search.closest[1]}")
    return search.best.replicas, search.best.latencies.busy


def scaled(rates: Sequence[float], peak: float) -> list[float]:
    """The same day with another highest rate."""
    return [rate / max(rates) * peak for rate in rates]
