"""Every scheme on every machine: the smallest deployment that meets a demand, or why there is none.

For a scheme on a machine, `search` asks each split that fits how many replicas the rate takes.
Replicas share the requests evenly; a pipeline of p stages counts as p engines, each with its part
of the KV cache, that see steps of the whole model. Options are ranked by price where prices are
known, by devices otherwise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any

from vllm_compress.operations.capacity.calibration.fit import Calibration, step_model
from vllm_compress.operations.capacity.footprint.memory import Fit, Layout, fit
from vllm_compress.operations.capacity.footprint.storage import Scheme
from vllm_compress.operations.capacity.hardware import Hardware
from vllm_compress.operations.capacity.power import Power
from vllm_compress.operations.capacity.search import (
    Candidate,
    Latencies,
    Rejected,
    Search,
    Trial,
    capacity_of,
)
from vllm_compress.operations.capacity.throughput.demand import Demand
from vllm_compress.operations.capacity.throughput.performance import Step, kernel_refusal
from vllm_compress.operations.capacity.throughput.speculation import (
    SpeculativeStep,
    speculate,
    tokens_per_step,
    written,
)

STAGES = 4
BASES = ("measured", "scaled", "roofline")
MOST_DEVICES = 32


@dataclass(frozen=True)
class Option:
    """A scheme on a machine. Without `layout` nothing fits; `meets` says whether it is an answer.

    `capacity` is the output tokens per second of all replicas when always busy, `misses` the worst
    ratio of a percentile to its bound, prices are in the currency of the table's. `watts` are of
    all devices on average; a million is of output tokens. `draft` says how one is used.
    """

    scheme: str
    label: str
    hardware: str
    weight_bytes: int
    devices_for_weights: int
    smallest: int | None
    meets: bool
    layout: str | None = None
    devices_per_replica: int = 0
    replicas: int = 0
    devices: int = 0
    basis: str = ""
    memory: dict[str, int] = dataclasses.field(default_factory=dict)
    latency: Latencies | None = None
    tokens_per_second: float = 0.0
    capacity: float = 0.0
    price_per_hour: float | None = None
    price_per_million: float | None = None
    watts: float | None = None
    kwh_per_million: float | None = None
    co2_kg_per_million: float | None = None
    misses: float = float("inf")
    closest: str = ""
    draft: dict[str, Any] | None = None
    rejected: tuple[Rejected, ...] = ()


@dataclass(frozen=True)
class Planner:
    """What all options have in common."""

    demand: Demand
    kv_value_bytes: int = 2
    calibration: Calibration | None = None
    reference: Scheme | None = None
    seed: int = 0
    power: Power = field(default_factory=Power)

    def plan(self, schemes: Sequence[Scheme], machines: Sequence[Hardware]) -> list[Option]:
        """Every scheme on every machine, best first."""
        options = [self.option(scheme, machine) for scheme in schemes for machine in machines]
        return sorted(options, key=_rank)

    def option(self, scheme: Scheme, machine: Hardware) -> Option:
        """Find the smallest deployment of a scheme on a machine, or why there is none."""
        machine = self.adapted(machine)
        bare = Option(
            scheme.name,
            scheme.label,
            machine.key,
            scheme.weight_bytes,
            ceil(scheme.weight_bytes / machine.memory_bytes),
            None,
            False,
        )
        refused = kernel_refusal(scheme, machine)
        if refused is None and scheme.draft is not None:
            refused = kernel_refusal(scheme.draft, machine)
        if refused is not None:
            return dataclasses.replace(
                bare, rejected=(Rejected("any", 1, refused),), closest=refused
            )
        fits, rejected = self._fits(scheme, machine)
        if not fits:
            last = rejected[-1].reason if rejected else ""
            return dataclasses.replace(bare, rejected=tuple(rejected), closest=last)
        bare = dataclasses.replace(bare, smallest=min(f.layout.devices for f in fits))
        return self._choose(bare, scheme, machine, rejected)

    def adapted(self, machine: Hardware) -> Hardware:
        """The machine as it was measured, where it was."""
        return machine if self.calibration is None else self.calibration.adapt(machine)

    def candidates(self, scheme: Scheme, machine: Hardware) -> list[Candidate]:
        """Every split of a replica that fits, and what it keeps up with."""
        machine = self.adapted(machine)
        candidates = []
        for found in self._fits(scheme, machine)[0]:
            step, basis = self._step(scheme, machine, found.layout)
            capacity = capacity_of(step, self.demand, machine, found)
            candidates.append(Candidate(found, step, basis, capacity))
        return candidates

    def _step(self, scheme: Scheme, machine: Hardware, layout: Layout) -> tuple[Step, str]:
        """How long steps take and what that is based on; with a draft, the weaker of two bases."""
        known = (machine, layout, self.kv_value_bytes, self.calibration, self.reference)
        step, basis = step_model(scheme.alone, *known)
        if scheme.draft is None:
            return step, basis
        draft, other = step_model(scheme.draft, *known)
        context = self.demand.prompt + self.demand.output / 2
        step = speculate(step, draft, scheme.acceptance, machine.max_sequences, context)
        return step, max(basis, other, key=BASES.index)

    def _fits(self, scheme: Scheme, machine: Hardware) -> tuple[list[Fit], list[Rejected]]:
        """Splits that hold a request of the longest context, and why others do not."""
        fits, rejected = [], []
        for layout in layouts(machine):
            found = fit(scheme, machine, layout, self.demand.context, self.kv_value_bytes)
            if found.reason is None:
                fits.append(found)
            else:
                rejected.append(Rejected(str(layout), layout.devices, found.reason))
        return fits, rejected

    def _choose(
        self, bare: Option, scheme: Scheme, machine: Hardware, rejected: list[Rejected]
    ) -> Option:
        """Choose the split and the replicas that meet the demand with fewest devices."""
        candidates = self.candidates(scheme, machine)
        search = Search(self.demand, machine, self.seed)
        search.run(candidates)
        rejected = sorted([*rejected, *search.rejected], key=lambda r: r.devices)
        bare = dataclasses.replace(bare, rejected=tuple(rejected))
        if search.best is None:
            ratio, text = search.closest
            return dataclasses.replace(bare, misses=ratio, closest=text, basis=candidates[-1].basis)
        return self._answer(bare, machine, search.best)

    def _answer(self, bare: Option, machine: Hardware, trial: Trial) -> Option:
        """Fill `bare` with all that is known of the chosen trial."""
        candidate, d = trial.candidate, self.demand
        found = candidate.found
        tokens = d.rate * d.output
        price = machine.price_per_hour
        hourly = None if price is None else price * trial.devices
        return dataclasses.replace(
            bare,
            meets=True,
            layout=str(found.layout),
            devices_per_replica=found.layout.devices,
            replicas=trial.replicas,
            devices=trial.devices,
            basis=candidate.basis,
            memory={
                "weights": found.weights,
                "overhead": found.overhead,
                "kv_cache": found.kv_bytes,
                "usable": found.usable,
                "requests": found.requests(d.prompt + d.output),
            },
            latency=trial.latencies,
            tokens_per_second=tokens,
            capacity=trial.replicas * candidate.capacity * d.output,
            price_per_hour=hourly,
            price_per_million=None if hourly is None else per_million(hourly, tokens),
            misses=trial.miss,
            draft=_drafting(candidate.step, trial),
            **self._energy(machine, trial, tokens),
        )

    def _energy(self, machine: Hardware, trial: Trial, tokens_per_second: float) -> dict[str, Any]:
        """What the chosen trial draws; nothing where the rated watts are not known."""
        if machine.watts is None:
            return {}
        watts = self.power.watts(machine.watts, trial.devices, trial.latencies.busy)
        kwh = self.power.kwh_per_million(watts, tokens_per_second)
        return {
            "watts": watts,
            "kwh_per_million": kwh,
            "co2_kg_per_million": self.power.co2_kg_per_million(kwh),
        }


def _drafting(step: Step, trial: Trial) -> dict[str, Any] | None:
    """How a draft is used, if there is one; tokens a step are those at the mean of requests."""
    if not isinstance(step, SpeculativeStep):
        return None
    running = trial.latencies.running / trial.candidate.engines
    ahead = step.ahead(max(1, round(running)))
    return {
        "acceptance": step.acceptance,
        "draft_tokens": written(step.schedule),
        "tokens_per_step": tokens_per_step(step.acceptance, ahead),
    }


def per_million(price_per_hour: float, tokens_per_second: float) -> float:
    """The price of a million tokens."""
    return price_per_hour / (tokens_per_second * 3600) * 1e6


def layouts(machine: Hardware) -> list[Layout]:
    """Splits to look at, fewest devices first. A CPU host is one device."""
    if machine.kind == "cpu":
        return [Layout()]
    ways = [Layout(tp, pp) for tp in range(1, machine.per_host + 1) for pp in range(1, STAGES + 1)]
    return sorted((w for w in ways if w.devices <= MOST_DEVICES), key=lambda w: (w.devices, w.pp))


def _rank(option: Option) -> tuple[Any, ...]:
    price = option.price_per_hour
    if not option.meets:
        return (1, option.misses, option.weight_bytes)
    assert option.latency is not None
    return (0, price is None, price or 0.0, option.devices, option.latency.ttft["p95"])
