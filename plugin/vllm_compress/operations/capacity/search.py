"""The fewest devices of one scheme on one machine: every split, with as many replicas as it takes.

Bounds come first. A replica keeps up with what it answers when always busy (`capacity_of`), so
fewer replicas than the rate needs are never tried: their queue grows for ever. One request that
has a replica to itself is as fast as any gets, so a split too slow for that is left out. All others
are simulated: more replicas by doubling until the objectives hold, then fewer by halving. A split
is given up only once it needs more devices than another one does.

Nothing that is tried depends on the objectives, only how it is judged. So a looser objective meets
wherever a stricter one does, at each fork takes the same way or that of fewer replicas, and never
needs more devices.

Fails where more replicas are slower: of two numbers that meet, the halving may find the larger.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import ceil

from vllm_compress.operations.capacity.footprint.memory import Fit
from vllm_compress.operations.capacity.hardware import Hardware
from vllm_compress.operations.capacity.throughput.demand import Demand, Objective, duration
from vllm_compress.operations.capacity.throughput.load import Load, cached_tokens, load_of
from vllm_compress.operations.capacity.throughput.performance import Step
from vllm_compress.operations.capacity.throughput.simulation import (
    Engine,
    merge,
    percentile,
    simulate,
)

# Requests of one simulation: so many times those that run at once, within the bounds.
LEAST_REQUESTS, MOST_REQUESTS, TURNS = 300, 3000, 6
# While the first ones come an engine is emptier than later, so this far off is too far.
HOPELESS = 1.5
# An engine busy for a smaller share of the time than this gains nothing from more replicas.
IDLE = 0.002
SHARES = (0.5, 0.95, 0.99)


@dataclass(frozen=True)
class Rejected:
    """A split of a replica, or a number of replicas, that is not it."""

    layout: str
    devices: int
    reason: str


@dataclass(frozen=True)
class Latencies:
    """Seconds by percentile; `busy` is the share of the time in which a step ran."""

    ttft: dict[str, float]
    tpot: dict[str, float]
    preemptions: int
    running: float
    busy: float = 0.0


@dataclass(frozen=True)
class Candidate:
    """A split that fits, and the requests per second that one replica of it keeps up with."""

    found: Fit
    step: Step
    basis: str
    capacity: float

    @property
    def engines(self) -> int:
        return self.found.layout.pp

    @property
    def devices(self) -> int:
        return self.found.layout.devices

    def fewest(self, rate: float) -> int:
        """Replicas that keep up with a rate."""
        return max(1, ceil(rate / self.capacity * (1 - 1e-12)))


@dataclass(frozen=True)
class Trial:
    """A number of replicas as simulated; `miss` is its worst ratio of a percentile to its bound."""

    candidate: Candidate
    replicas: int
    latencies: Latencies
    miss: float
    reason: str

    @property
    def meets(self) -> bool:
        return self.miss <= 1

    @property
    def devices(self) -> int:
        return self.replicas * self.candidate.devices

    @property
    def rank(self) -> tuple[int, int, int]:
        """Fewest devices first, then the smallest replicas, then the shortest pipeline."""
        return self.devices, self.candidate.devices, self.candidate.engines


def steady_seconds(step: Step, demand: Demand, machine: Hardware, batch: int) -> float:
    """Seconds between two tokens where `batch` requests always decode.

    Of b requests, b / output end in each step, and as many prompts begin, less what is cached.
    """
    cached = demand.cached * demand.prompt
    prompts = batch / demand.output * (demand.prompt - cached)
    context = batch * step.effective(demand.prompt + demand.output / 2)
    pairs = prompts * step.effective((cached + demand.prompt) / 2)
    steps = max(1.0, prompts / max(1, machine.max_tokens - batch))
    tokens = round((batch + prompts) / steps)
    return steps * step.seconds(tokens, batch, context / steps, pairs / steps)


def capacity_of(step: Step, demand: Demand, machine: Hardware, found: Fit) -> float:
    """Requests per second that a replica answers when always busy, however long each takes."""
    engines = found.layout.pp
    most = found.requests(demand.prompt + demand.output) // engines
    most = min(machine.max_sequences, max(1, most))
    batches = {most, *(2**i for i in range(most.bit_length()))}
    rates = (b / (demand.output * steady_seconds(step, demand, machine, b)) for b in batches)
    return engines * max(rates)


@dataclass
class Search:
    """One search. `best` is the answer so far, `below` the replicas that are one too few for it and
    why, `closest` the least miss and what it was."""

    demand: Demand
    machine: Hardware
    seed: int = 0
    best: Trial | None = None
    closest: tuple[float, str] = (float("inf"), "")
    rejected: list[Rejected] = field(default_factory=list)
    below: tuple[int, str] = (0, "")

    def run(self, candidates: Sequence[Candidate]) -> None:
        """Find the best trial of all candidates, those likely to need few devices first."""

        def least(candidate: Candidate) -> tuple[int, int, int]:
            devices = candidate.fewest(self.demand.rate) * candidate.devices
            return devices, candidate.devices, candidate.engines

        able = [candidate for candidate in candidates if self._alone(candidate)]
        for candidate in sorted(able, key=least):
            self._fewest(candidate)
        if self.best is not None and self.below[0]:
            self._reject(self.best.candidate, *self.below)

    def _alone(self, candidate: Candidate) -> bool:
        """Tell whether one request that has a replica to itself meets the objectives: of a trace,
        one as long as the percentile's."""
        ratio, text = 0.0, ""
        for objective in self.demand.objectives:
            prompt = self.demand.prompt_at(objective.share)
            ttft, tpot = self._alone_seconds(candidate.step, prompt)
            said = {
                "ttft": f"one request alone waits {duration(ttft)} for its first token",
                "tpot": f"one request alone takes {duration(tpot)} per token",
            }[objective.metric]
            seconds = ttft if objective.metric == "ttft" else tpot
            ratio, text = max((ratio, text), (seconds / objective.seconds, said))
        if ratio <= 1:
            return True
        layout = candidate.found.layout
        self.rejected.append(Rejected(str(layout), layout.devices, text))
        self.closest = min(self.closest, (ratio, f"{layout}: {text}"))
        return False

    def _alone_seconds(self, step: Step, prompt: int) -> tuple[float, float]:
        """Seconds to the first token, and for each other one, of a request without company."""
        tpot = step.seconds(1, 1, step.effective(prompt + self.demand.output / 2), 0.0)
        ttft, done = step.request_seconds, cached_tokens(prompt, self.demand.cached)
        while done < prompt:
            n = min(self.machine.max_tokens, prompt - done)
            ttft += step.seconds(n, 1, 0.0, n * step.effective(done + n / 2))
            done += n
        return ttft, tpot

    def _fewest(self, candidate: Candidate) -> None:
        """Find the fewest replicas that meet; give up where another split needs fewer devices."""
        low = candidate.fewest(self.demand.rate) - 1
        reason = f"keeps up with {low * candidate.capacity:.3g} requests/s"
        found: Trial | None = None
        further = 1
        while found is None or found.replicas - low > 1:
            if self._beaten(candidate, low + 1) or self._idle(candidate, low):
                break
            between = low + further if found is None else (low + found.replicas) // 2
            trial = self.trial(candidate, between)
            if trial.meets:
                found = trial
                continue
            low, reason, further = between, trial.reason, 2 * further
            text = f"{low} x {candidate.found.layout}: {reason}"
            self.closest = min(self.closest, (trial.miss, text))
        if found is None or found.replicas - low > 1:
            self._reject(candidate, low, reason)
        elif self.best is None or found.rank < self.best.rank:
            if self.best is not None:
                self._reject_trial(self.best)
            self.best, self.below = found, (low, reason)
        else:
            self._reject_trial(found)

    def _reject(self, candidate: Candidate, replicas: int, reason: str) -> None:
        """Note that so many replicas are too few; under one replica's devices if they are many."""
        layout, devices = candidate.found.layout, replicas * candidate.devices
        if not replicas:
            reason = "another split needs no more devices than one of its replicas"
        elif self.best is not None and devices >= self.best.devices:
            reason = f"{replicas} replicas, {devices} devices, are too few: {reason}"
        else:
            self.rejected.append(Rejected(f"{replicas} x {layout}", devices, reason))
            return
        self.rejected.append(Rejected(str(layout), candidate.devices, reason))

    def _reject_trial(self, trial: Trial) -> None:
        text = f"{trial.replicas} replicas, {trial.devices} devices, for this rate"
        layout = trial.candidate.found.layout
        self.rejected.append(Rejected(str(layout), layout.devices, text))

    def _beaten(self, candidate: Candidate, replicas: int) -> bool:
        """Tell whether so many replicas are already worse than the best."""
        rank = replicas * candidate.devices, candidate.devices, candidate.engines
        return self.best is not None and rank > self.best.rank

    def _idle(self, candidate: Candidate, replicas: int) -> bool:
        """Tell whether each engine has so little to do that more of them change nothing."""
        if not replicas:
            return False
        ttft, tpot = self._alone_seconds(candidate.step, self.demand.prompt)
        share = self.demand.rate / (replicas * candidate.engines)
        return share * (ttft + self.demand.output * tpot) < IDLE

    def trial(self, candidate: Candidate, replicas: int) -> Trial:
        """Simulate one engine that gets its share of the requests: a few, and as many as it takes
        to see a steady state unless those few are hopeless."""
        requests = MOST_REQUESTS
        if self.demand.trace is None:  # a trace's busiest few say nothing of the others
            rate = self.demand.rate / (replicas * candidate.engines)
            requests = TURNS * round(self._at_once(candidate.step, rate))
            if requests > LEAST_REQUESTS:
                few, _ = self._simulate(candidate, replicas, LEAST_REQUESTS)
                if few.miss > HOPELESS:
                    return few
            requests = min(MOST_REQUESTS, max(LEAST_REQUESTS, requests))
        trial, queue_grows = self._simulate(candidate, replicas, requests)
        if queue_grows and trial.meets:
            text = "its queue grows for as long as requests come"
            return replace(trial, miss=float("inf"), reason=text)
        return trial

    def _simulate(self, candidate: Candidate, replicas: int, requests: int) -> tuple[Trial, bool]:
        """What so many requests meet, and whether the queue grows."""
        found, engines, d = candidate.found, candidate.engines, self.demand
        assert found.cache is not None
        machine = self.machine
        engine = Engine(
            machine.max_tokens, machine.max_sequences, found.pool // engines, found.cache
        )
        out = merge(
            simulate(candidate.step, engine, load)
            for load in self._loads(replicas * engines, requests)
        )

        def spread(values: list[float]) -> dict[str, float]:
            shares = sorted({*SHARES, *(o.share for o in d.objectives)})
            return {f"p{100 * s:g}": percentile(values, s) for s in shares}

        latencies = Latencies(
            spread(out.ttft),
            spread(out.tpot),
            out.preemptions,
            out.mean_running * engines,
            out.busy,
        )
        miss, reason = self._worst(latencies)
        return Trial(candidate, replicas, latencies, miss, reason), out.queue_grows

    def _loads(self, engines: int, requests: int) -> list[Load]:
        """So many requests of one of the engines; of a trace of fewer, those of several."""
        d = self.demand
        if d.trace is None:
            rate = d.rate / engines
            return [Load(d.prompt, d.output, requests, rate, seed=self.seed, cached=d.cached)]
        loads: list[Load] = []
        for first in range(engines):
            arrivals = d.trace.turns(engines, first, requests)
            if not arrivals or sum(load.requests for load in loads) >= LEAST_REQUESTS:
                break
            loads.append(load_of(arrivals, d.cached))
        return loads

    def _at_once(self, step: Step, rate: float) -> float:
        """Estimate how many requests run at once, where all that come are answered."""
        d = self.demand
        low, high = 0, self.machine.max_sequences
        while low < high:
            middle = (low + high) // 2
            answered = middle / (d.output * steady_seconds(step, d, self.machine, middle))
            low, high = (middle + 1, high) if answered < rate else (low, middle)
        return low

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
