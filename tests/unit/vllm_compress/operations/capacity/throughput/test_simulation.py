"""The simulation against queueing theory, and against a plain simulator of every single step."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_compress.operations.capacity.throughput.load import Arrival, Load, cached_tokens, load_of
from vllm_compress.operations.capacity.throughput.simulation import (
    Engine,
    Outcome,
    _poisson,
    merge,
    percentile,
    simulate,
)


@dataclass(frozen=True)
class Linear:
    """A step whose time is a sum of its parts."""

    fixed: float = 0.01
    per_token: float = 0.0
    per_context: float = 0.0
    request_seconds: float = 0.0

    def effective(self, length: float) -> float:
        return length

    def seconds(self, tokens: int, sampled: int, context: float, pairs: float) -> float:
        return self.fixed + tokens * self.per_token + context * self.per_context


@dataclass(frozen=True)
class Paged:
    """Blocks of a size."""

    block: int = 16

    def blocks(self, length: int) -> int:
        return math.ceil(length / self.block)


def engine(sequences: int = 1000, pool: int = 10**6, tokens: int = 2048) -> Engine:
    return Engine(tokens, sequences, pool, Paged())


@pytest.mark.parametrize("busy", [0.3, 0.6, 0.8])
def test_one_at_a_time_waits_as_long_as_an_m_d_1_queue(busy: float) -> None:
    service = 0.01
    load = Load(1, 1, 60_000, rate=busy / service, seed=1)
    out = simulate(Linear(service), engine(sequences=1), load)
    expected = busy * service / (2 * (1 - busy))
    assert statistics.mean(out.ttft) - service == pytest.approx(expected, rel=0.08)


@given(
    clients=st.integers(1, 40),
    prompt=st.integers(1, 300),
    output=st.integers(2, 60),
    sequences=st.integers(1, 50),
)
def test_littles_law_holds_for_clients_who_wait(
    clients: int, prompt: int, output: int, sequences: int
) -> None:
    """Requests in the system = rate * time in it, once every client has many turns."""
    load = Load(prompt, output, 40 * clients, clients=clients)
    out = simulate(Linear(per_token=1e-4), engine(sequences=sequences), load)
    rate = load.requests / out.seconds
    assert rate * statistics.mean(out.latency) == pytest.approx(clients, rel=0.12)


def test_littles_law_holds_for_poisson_arrivals() -> None:
    load = Load(100, 50, 4000, rate=3.0, seed=3)
    out = simulate(Linear(per_token=1e-5), engine(), load)
    # Requests wait for the step under way to end before they run.
    waited = 0.5 * 0.01
    running = 3.0 * (statistics.mean(out.latency) - waited)
    assert out.mean_running == pytest.approx(running, rel=0.05)


@given(
    prompt=st.integers(1, 400),
    output=st.integers(1, 40),
    rate=st.floats(0.2, 30),
    sequences=st.integers(1, 20),
    pool=st.integers(30, 200),
    tokens=st.integers(40, 600),
    seed=st.integers(0, 100),
)
def test_steps_taken_together_give_what_single_steps_do(
    prompt: int, output: int, rate: float, sequences: int, pool: int, tokens: int, seed: int
) -> None:
    load = Load(prompt, output, 30, rate=rate, seed=seed)
    limits = engine(sequences, pool, tokens)
    step = Linear(0.01, 1e-4, 0.0)
    quick, plain = simulate(step, limits, load), every_step(step, limits, load)
    assert quick.seconds == pytest.approx(plain.seconds, rel=1e-6)
    assert quick.preemptions == plain.preemptions
    for ours, theirs in ((quick.ttft, plain.ttft), (quick.tpot, plain.tpot)):
        assert sorted(ours) == pytest.approx(sorted(theirs), rel=1e-6, abs=1e-9)


ARRIVAL = st.builds(Arrival, st.floats(0, 20), st.integers(1, 400), st.integers(1, 40))


@given(
    arrivals=st.lists(ARRIVAL, min_size=12, max_size=40),
    cached=st.sampled_from([0.0, 0.3, 0.99]),
    sequences=st.integers(1, 20),
    pool=st.integers(30, 200),
    tokens=st.integers(40, 600),
)
def test_a_trace_and_a_prefix_cache_are_taken_as_single_steps_would(
    arrivals: list[Arrival], cached: float, sequences: int, pool: int, tokens: int
) -> None:
    load = load_of(tuple(sorted(arrivals)), cached)
    limits = engine(sequences, pool, tokens)
    step = Linear(0.01, 1e-4, 0.0)
    quick, plain = simulate(step, limits, load), every_step(step, limits, load)
    assert quick.seconds == pytest.approx(plain.seconds, rel=1e-6)
    assert quick.preemptions == plain.preemptions
    assert sorted(quick.ttft) == pytest.approx(sorted(plain.ttft), rel=1e-6, abs=1e-9)
    assert quick.tokens == sum(a.output for a in arrivals)


def test_a_trace_of_requests_alike_is_the_load_of_them() -> None:
    load = Load(100, 50, 400, rate=3.0, seed=3)
    same = load_of(tuple(_poisson(load)))
    alike, traced = (simulate(Linear(per_token=1e-4), engine(), each) for each in (load, same))
    assert (alike.ttft, alike.tpot, alike.seconds) == (traced.ttft, traced.tpot, traced.seconds)


def test_what_is_cached_is_not_computed() -> None:
    def first(cached: float) -> float:
        load = Load(1000, 2, 1, rate=1.0, cached=cached)
        return simulate(Linear(0.0, 1e-3), engine(), load).ttft[0]

    assert first(0.0) == pytest.approx(1.0)
    assert first(0.75) == pytest.approx(0.25)
    assert first(0.9999) == pytest.approx(1e-3)  # the last token is always computed


def test_busy_is_the_share_of_time_in_which_a_step_runs() -> None:
    out = simulate(Linear(0.01), engine(), load_of((Arrival(0.0, 1, 10), Arrival(0.9, 1, 10))))
    assert out.seconds == pytest.approx(1.0)
    assert out.busy == pytest.approx(0.2)


def test_engines_together_have_the_requests_of_each() -> None:
    outs = [simulate(Linear(), engine(), Load(10, n, n, rate=1.0)) for n in (5, 9)]
    both = merge(outs)
    assert both.ttft == outs[0].ttft + outs[1].ttft
    assert both.tokens == 25 + 81
    assert min(o.busy for o in outs) < both.busy < max(o.busy for o in outs)


@given(pool=st.integers(20, 60), clients=st.integers(1, 30))
def test_every_request_ends_however_little_cache_there_is(pool: int, clients: int) -> None:
    load = Load(100, 150, 2 * clients, clients=clients)
    out = simulate(Linear(), engine(pool=pool), load)
    assert out.tokens == load.requests * load.output


def test_too_little_cache_for_one_request_is_an_error() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        simulate(Linear(), engine(pool=3), Load(100, 100, 1, rate=1.0))


def test_less_cache_is_slower_and_preempts() -> None:
    load = Load(100, 200, 60, clients=30)
    wide, tight = (simulate(Linear(), engine(pool=pool), load) for pool in (10**4, 150))
    assert wide.preemptions == 0
    assert tight.preemptions > 0
    assert tight.tokens_per_second < wide.tokens_per_second


def test_alone_a_request_takes_its_prompt_and_one_step_per_token() -> None:
    step = Linear(0.01, 1e-3, 1e-6, request_seconds=0.5)
    out = simulate(step, engine(tokens=100), Load(250, 11, 1, rate=1.0))
    assert out.ttft[0] == pytest.approx(0.5 + 3 * 0.01 + 250e-3)
    mean_context = 250 + 4.5
    assert out.tpot[0] == pytest.approx(0.01 + 1e-3 + mean_context * 1e-6)


def test_the_same_seed_gives_the_same_arrivals() -> None:
    first, again, other = (
        simulate(Linear(), engine(), Load(10, 10, 50, rate=5.0, seed=seed)) for seed in (1, 1, 2)
    )
    assert first == again != other


@given(st.lists(st.floats(0, 100), min_size=1), st.floats(0, 1))
def test_percentiles_are_those_of_the_statistics_module(values: list[float], share: float) -> None:
    found = percentile(values, share)
    assert min(values) <= found <= max(values)
    if len(values) > 1:
        quartiles = statistics.quantiles(values, n=4, method="inclusive")
        assert percentile(values, 0.25) == pytest.approx(quartiles[0])


def every_step(step: Linear, limits: Engine, load: Load) -> Outcome:
    """The same scheduler, one step at a time over plain lists: slow, and easy to believe."""
    arrivals = list(load.trace or _poisson(load))
    now, preemptions = 0.0, 0
    waiting: list[dict] = []
    running: list[dict] = []
    done: list[dict] = []
    blocks = limits.pages.blocks
    while len(done) < load.requests:
        while arrivals and arrivals[0].sent <= now:
            sent, prompt, wanted = arrivals.pop(0)
            known = {"sent": sent, "prompt": prompt, "wanted": wanted}
            known["cached"] = cached_tokens(prompt, load.cached)
            waiting.append({**known, "target": prompt, "have": known["cached"], "out": 0})
        if not running and not waiting:
            now = arrivals[0].sent
            continue

        def held(later: int = 0) -> int:
            return sum(
                blocks(r["have"] + later if r["have"] >= r["target"] else r["target"])
                for r in running
            )

        evicted = False
        while len(running) > 1 and held(1) > limits.pool:
            begun = [r for r in running if r["have"] < r["target"]]
            victim = begun[-1] if begun else max(running, key=lambda r: r["joined"])
            running.remove(victim)
            victim.update(target=victim["prompt"] + victim["out"], have=victim["cached"])
            waiting.insert(0, victim)
            preemptions, evicted = preemptions + 1, True
        decoding = [r for r in running if r["have"] >= r["target"]]
        budget = limits.max_tokens - len(decoding)
        chunks = []
        for r in [r for r in running if r["have"] < r["target"]]:
            chunks.append((r, min(budget, r["target"] - r["have"])))
            budget -= chunks[-1][1]
        free = limits.pool - held(1)
        while not evicted and waiting and budget > 0 and len(running) < limits.max_sequences:
            if blocks(waiting[0]["target"]) > free:
                break
            r = waiting.pop(0)
            free -= blocks(r["target"])
            running.append(r)
            chunks.append((r, min(budget, r["target"] - r["have"])))
            budget -= chunks[-1][1]
        tokens = len(decoding) + sum(n for _, n in chunks)
        now += step.seconds(tokens, 0, 0.0, 0.0)
        for r in decoding:
            r["have"] += 1
            r["out"] += 1
        for r, n in chunks:
            r["have"] += n
            if r["have"] >= r["target"]:
                r["joined"] = (now, len(done), running.index(r))
                r.setdefault("first", now)
                r["out"] += 1
        for r in [r for r in running if r["out"] >= r["wanted"]]:
            running.remove(r)
            done.append({**r, "last": now})
    kept = done[len(done) // 10 :]
    ttft = [r["first"] - r["sent"] for r in kept]
    tpot = [(r["last"] - r["first"]) / (r["wanted"] - 1) for r in kept if r["wanted"] > 1]
    return Outcome(ttft, tpot, [], now, 0, preemptions, 0.0)
