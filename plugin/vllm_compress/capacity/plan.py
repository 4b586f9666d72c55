"""Every scheme on every machine: the smallest deployment that meets a demand, or why there is none.

For a scheme on a machine, each split that fits is asked how many replicas the rate takes: first by
a formula (the largest batch whose steps keep the time per token), then the best few by simulation.
Replicas share the requests evenly; a pipeline of p stages counts as p engines, each with its part
of the KV cache, that see steps of the whole model. Options are ranked by price where prices are
known, by devices otherwise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

from vllm_compress.capacity.calibration import Calibration, step_model
from vllm_compress.capacity.demand import Demand, Objective, duration
from vllm_compress.capacity.hardware import Hardware
from vllm_compress.capacity.memory import Fit, Layout, fit
from vllm_compress.capacity.performance import Step, kernel_refusal
from vllm_compress.capacity.simulation import Engine, Load, percentile, simulate
from vllm_compress.capacity.storage import Scheme

STAGES = 4
MOST_DEVICES = 32
REQUESTS = 300
SIMULATED = 2
MOST_SIMULATED = 5
TRIES = 10
BUSIEST = 0.95
SHARES = (0.5, 0.95, 0.99)


@dataclass(frozen=True)
class Rejected:
    """A split of a replica, or a number of replicas, that is not it."""

    layout: str
    devices: int
    reason: str


@dataclass(frozen=True)
class Latencies:
    """Seconds by percentile."""

    ttft: dict[str, float]
    tpot: dict[str, float]
    preemptions: int
    running: float


@dataclass(frozen=True)
class Option:
    """A scheme on a machine. Without `layout` nothing fits; `meets` says whether it is an answer.

    `capacity` is the output tokens per second of all replicas when always busy, `misses` the worst
    ratio of a percentile to its bound, prices are in the currency of the table's.
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
    misses: float = float("inf")
    closest: str = ""
    rejected: tuple[Rejected, ...] = ()


@dataclass
class _Candidate:
    """A split that fits, and what is known of its speed."""

    found: Fit
    step: Step
    basis: str
    rate: float
    replicas: int
    fewer: str = ""

    @property
    def engines(self) -> int:
        return self.found.layout.pp

    @property
    def devices(self) -> int:
        return self.replicas * self.found.layout.devices


@dataclass(frozen=True)
class Planner:
    """What all options have in common."""

    demand: Demand
    kv_value_bytes: int = 2
    calibration: Calibration | None = None
    reference: Scheme | None = None
    seed: int = 0

    def plan(self, schemes: Sequence[Scheme], machines: Sequence[Hardware]) -> list[Option]:
        """Every scheme on every machine, best first."""
        options = [self.option(scheme, machine) for scheme in schemes for machine in machines]
        return sorted(options, key=_rank)

    def option(self, scheme: Scheme, machine: Hardware) -> Option:
        if self.calibration is not None:
            machine = self.calibration.adapt(machine)
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
        if refused is not None:
            return dataclasses.replace(
                bare, rejected=(Rejected("any", 1, refused),), closest=refused
            )
        rejected: list[Rejected] = []
        fits = []
        for layout in layouts(machine):
            found = fit(scheme, machine, layout, self.demand.context, self.kv_value_bytes)
            if found.reason is None:
                fits.append(found)
            else:
                rejected.append(Rejected(str(layout), layout.devices, found.reason))
        if not fits:
            last = rejected[-1].reason if rejected else ""
            return dataclasses.replace(bare, rejected=tuple(rejected), closest=last)
        bare = dataclasses.replace(bare, smallest=min(f.layout.devices for f in fits))
        return self._choose(bare, scheme, machine, fits, rejected)

    def _choose(
        self,
        bare: Option,
        scheme: Scheme,
        machine: Hardware,
        fits: list[Fit],
        rejected: list[Rejected],
    ) -> Option:
        candidates, nearest_miss = [], (float("inf"), "")
        for found in fits:
            step, basis = step_model(
                scheme, machine, found.layout, self.kv_value_bytes, self.calibration, self.reference
            )
            ratio, text = self._alone(step, machine)
            if ratio > 1:
                rejected.append(Rejected(str(found.layout), found.layout.devices, text))
                nearest_miss = min(nearest_miss, (ratio, f"{found.layout}: {text}"))
                continue
            rate = self._sustained(step, found, machine)
            each = BUSIEST * rate * found.layout.pp
            replicas = max(1, ceil(self.demand.rate / each)) if each else 10**6
            candidates.append(_Candidate(found, step, basis, rate, replicas))
        candidates.sort(key=lambda c: (c.devices, c.found.layout.devices, c.found.layout.pp))
        best: tuple[_Candidate, Latencies] | None = None
        failed = set()
        for i, candidate in enumerate(candidates[:MOST_SIMULATED]):
            if best is not None and i >= SIMULATED:
                break
            most = None if best is None else best[0].devices
            answer = self._replicas(candidate, machine, most)
            if isinstance(answer, Latencies):
                best = (candidate, answer)
            elif answer[0] > 1:
                nearest_miss = min(
                    nearest_miss, (answer[0], f"{candidate.found.layout}: {answer[1]}")
                )
                layout = candidate.found.layout
                rejected.append(Rejected(str(layout), layout.devices, answer[1]))
                failed.add(id(candidate))
        if best is None:
            ratio, text = nearest_miss
            return dataclasses.replace(
                bare, misses=ratio, closest=text, rejected=tuple(rejected), basis=basis
            )
        for other in candidates:
            if other is not best[0] and id(other) not in failed:
                layout = other.found.layout
                text = f"{other.replicas} replicas, {other.devices} devices, for this rate"
                rejected.append(Rejected(str(layout), layout.devices, text))
        chosen, latencies = best
        if chosen.fewer:
            devices = (chosen.replicas - 1) * chosen.found.layout.devices
            name = f"{chosen.replicas - 1} x {chosen.found.layout}"
            rejected.append(Rejected(name, devices, chosen.fewer))
        return self._answer(bare, machine, chosen, latencies, rejected)

    def _alone(self, step: Step, machine: Hardware) -> tuple[float, str]:
        """How far one request that has everything to itself is from the objectives."""
        d = self.demand
        length = d.prompt + d.output / 2
        tpot = step.seconds(1, 1, step.effective(length), 0.0)
        ttft, done = step.request_seconds, 0
        while done < d.prompt:
            n = min(machine.max_tokens, d.prompt - done)
            ttft += step.seconds(n, 1, 0.0, n * step.effective(done + n / 2))
            done += n
        worst = max((tpot / d.limit("tpot"), "tpot"), (ttft / d.limit("ttft"), "ttft"))
        if worst[1] == "tpot":
            text = f"one request alone takes {duration(tpot)} per token"
        else:
            text = f"one request alone waits {duration(ttft)} for its first token"
        return worst[0], text

    def _sustained(self, step: Step, found: Fit, machine: Hardware) -> float:
        """Requests per second of one engine, from the largest batch that keeps the time per token.

        With b requests decoding, b / output of them end in each step, and as many prompts begin.
        """
        d = self.demand
        most = found.requests(d.prompt + d.output) // found.layout.pp
        most = min(machine.max_sequences, max(1, most))

        def seconds(batch: int) -> float:
            prompts = batch / d.output * d.prompt
            context = batch * step.effective(d.prompt + d.output / 2)
            pairs = prompts * step.effective(d.prompt / 2)
            whole = prompts / max(1, machine.max_tokens - batch)
            steps = max(1.0, whole)
            tokens = round((batch + prompts) / steps)
            return steps * step.seconds(tokens, batch, context / steps, pairs / steps)

        limit = d.limit("tpot")
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if seconds(middle) <= limit else (low, middle - 1)
        return low / (d.output * seconds(low)) if low else 0.0

    def _replicas(
        self, candidate: _Candidate, machine: Hardware, most: int | None
    ) -> Latencies | tuple[float, str]:
        """Fewest replicas that meet the objectives in simulation, in `candidate`; else why not."""
        floor = max(
            1, ceil(self.demand.rate * BUSIEST / max(1e-9, candidate.rate * candidate.engines))
        )
        answer: Latencies | None = None
        missed = (float("inf"), "no number of replicas was enough")
        count = candidate.replicas
        for _ in range(TRIES):
            if most is not None and count * candidate.found.layout.devices >= most:
                return (0.0, "") if answer is None else answer
            latencies = self._simulate(candidate, machine, count)
            ratio, text = self._worst(latencies)
            if ratio <= 1:
                candidate.replicas, answer = count, latencies
                if missed[0] < float("inf") or count == 1:
                    return answer
                if count <= floor:
                    most_rate = (count - 1) * candidate.rate * candidate.engines
                    candidate.fewer = f"keeps up with {most_rate:.3g} requests/s"
                    return answer
                count -= 1
            else:
                missed, candidate.fewer = min(missed, (ratio, text)), text
                if answer is not None:
                    return answer
                count += max(1, count // 6)
        return missed if answer is None else answer

    def _simulate(self, candidate: _Candidate, machine: Hardware, replicas: int) -> Latencies:
        found, engines = candidate.found, candidate.engines
        assert found.cache is not None
        engine = Engine(
            machine.max_tokens, machine.max_sequences, found.pool // engines, found.cache
        )
        rate = self.demand.rate / (replicas * engines)
        d = self.demand
        load = Load(d.prompt, d.output, REQUESTS, rate=rate, seed=self.seed)
        out = simulate(candidate.step, engine, load)

        def spread(values: list[float]) -> dict[str, float]:
            shares = sorted({*SHARES, *(o.share for o in d.objectives)})
            return {f"p{100 * s:g}": percentile(values, s) for s in shares}

        return Latencies(
            spread(out.ttft), spread(out.tpot), out.preemptions, out.mean_running * engines
        )

    def _worst(self, found: Latencies) -> tuple[float, str]:
        def reached(objective: Objective) -> float:
            values: dict[str, float] = getattr(found, objective.metric)
            return values[f"p{100 * objective.share:g}"]

        worst = max(self.demand.objectives, key=lambda o: reached(o) / o.seconds, default=None)
        if worst is None:
            return 0.0, ""
        value = reached(worst)
        name = f"{worst.metric} p{100 * worst.share:g}"
        text = f"{name} is {duration(value)}, not {duration(worst.seconds)}"
        return value / worst.seconds, text

    def _answer(
        self,
        bare: Option,
        machine: Hardware,
        candidate: _Candidate,
        latencies: Latencies,
        rejected: list[Rejected],
    ) -> Option:
        found, d = candidate.found, self.demand
        tokens = d.rate * d.output
        price = machine.price_per_hour
        hourly = None if price is None else price * candidate.devices
        return dataclasses.replace(
            bare,
            meets=True,
            layout=str(found.layout),
            devices_per_replica=found.layout.devices,
            replicas=candidate.replicas,
            devices=candidate.devices,
            basis=candidate.basis,
            memory={
                "weights": found.weights,
                "overhead": found.overhead,
                "kv_cache": found.kv_bytes,
                "usable": found.usable,
                "requests": found.requests(d.prompt + d.output),
            },
            latency=latencies,
            tokens_per_second=tokens,
            capacity=candidate.replicas * candidate.engines * candidate.rate * d.output,
            price_per_hour=hourly,
            price_per_million=None if hourly is None else hourly / (tokens * 3600) * 1e6,
            misses=self._worst(latencies)[0],
            rejected=tuple(sorted(rejected, key=lambda r: r.devices)),
        )


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
