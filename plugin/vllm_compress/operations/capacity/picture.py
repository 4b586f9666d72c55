"""Cost against latency: every split with few and with many replicas, and which of them nothing
beats. A point that is cheaper is to the left, a faster one is lower.

The search looks for the cheapest deployment that meets the objectives; this looks beside it, at up
to `SPAN` times its devices. Options without a price are drawn by their devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from compress_methods.system.files import write_picture
from vllm_compress.operations.capacity.footprint.storage import Scheme
from vllm_compress.operations.capacity.hardware import Hardware
from vllm_compress.operations.capacity.plan import Option, Planner, per_million
from vllm_compress.operations.capacity.search import Search, Trial
from vllm_compress.operations.capacity.throughput.demand import METRICS, Demand

SPAN = 4
STEPS = (1.0, 1.5, 2.0, 3.0, 4.0)
SHARE = "p95"
# Past so many times an objective a deployment is overloaded, and its latency that of the run.
OVERLOADED = 5.0


@dataclass(frozen=True)
class Point:
    """A deployment as simulated; seconds are 95th percentiles, costs of output tokens."""

    scheme: str
    hardware: str
    layout: str
    replicas: int
    devices: int
    ttft: float
    tpot: float
    meets: bool
    price_per_million: float | None

    @property
    def name(self) -> str:
        return f"{self.scheme} on {self.hardware}"


def points_of(planner: Planner, scheme: Scheme, machine: Hardware, option: Option) -> list[Point]:
    """Simulate deployments of an option that need up to `SPAN` times the devices of its answer, or
    of the fewest that keep up."""
    demand = planner.demand
    candidates = planner.candidates(scheme, machine)
    fewest = [candidate.fewest(demand.rate) for candidate in candidates]
    least = min((n * c.devices for n, c in zip(fewest, candidates, strict=True)), default=0)
    most = SPAN * (option.devices or least)
    search = Search(demand, planner.adapted(machine), planner.seed)
    points = []
    for candidate, first in zip(candidates, fewest, strict=True):
        counts = {ceil(first * step) for step in STEPS}
        if str(candidate.found.layout) == option.layout:
            counts.add(option.replicas)
        for replicas in sorted(counts):
            if replicas * candidate.devices <= most:
                trial = search.trial(candidate, replicas)
                if trial.miss <= OVERLOADED:
                    points.append(_point(option, machine, demand, trial))
    return points


def _point(option: Option, machine: Hardware, demand: Demand, trial: Trial) -> Point:
    price = machine.price_per_hour
    return Point(
        option.scheme,
        option.hardware,
        str(trial.candidate.found.layout),
        trial.replicas,
        trial.devices,
        trial.latencies.ttft[SHARE],
        trial.latencies.tpot[SHARE],
        trial.meets,
        None if price is None else per_million(price * trial.devices, demand.rate * demand.output),
    )


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those that no other is at once cheaper and faster than, cheapest first (Pareto)."""
    kept: list[tuple[float, float]] = []
    for cost, seconds in sorted(points):
        if not kept or seconds < kept[-1][1]:
            kept.append((cost, seconds))
    return kept


def draw(path: Path, points: Sequence[Point], demand: Demand) -> None:
    """Write a PNG: time to the first token and per output token, each against the cost."""
    from matplotlib.figure import Figure

    priced = all(point.price_per_million for point in points)
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    for axes, metric in zip(figure.subplots(1, 2), METRICS, strict=True):
        _panel(axes, points, demand, metric, priced)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    write_picture(path, figure)


def _panel(axes: Any, points: Sequence[Point], demand: Demand, metric: str, priced: bool) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    def place(point: Point) -> tuple[float, float]:
        cost = point.price_per_million if priced else point.devices
        return float(cost or 0.0), 1e3 * getattr(point, metric)

    names = list(dict.fromkeys(point.name for point in points))
    for name in names:
        colour = f"C{names.index(name) % 10}"
        for meets, face in ((True, colour), (False, "none")):
            some = [place(p) for p in points if p.name == name and p.meets is meets]
            label = name if meets else f"{name}, misses an objective"
            if some:
                x, y = zip(*some, strict=True)
                axes.scatter(x, y, s=26, facecolor=face, edgecolor=colour, label=label, zorder=2)
    best = frontier([place(point) for point in points])
    axes.step(*zip(*best, strict=True), where="post", color="0.5", zorder=1, label="nothing better")
    if demand.limit(metric) < float("inf"):
        axes.axhline(1e3 * demand.limit(metric), color="C3", linestyle=":", label="objective")
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("cost of a million output tokens" if priced else "devices")
    axes.set_ylabel(f"{METRICS[metric]}, {SHARE}, ms")
    axes.grid(alpha=0.3)
