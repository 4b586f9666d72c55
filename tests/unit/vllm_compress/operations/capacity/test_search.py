"""The search for the fewest devices: as good as trying everything, and no surprise in it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_compress.operations.capacity.footprint.memory import Cache, Fit, Layout, fit
from vllm_compress.operations.capacity.footprint.shapes import load_shape
from vllm_compress.operations.capacity.footprint.storage import Scheme, apply_recipe, as_it_is
from vllm_compress.operations.capacity.hardware import Hardware, find_hardware
from vllm_compress.operations.capacity.plan import Option, Planner, layouts
from vllm_compress.operations.capacity.search import Candidate, Search, capacity_of
from vllm_compress.operations.capacity.throughput.demand import Demand, Objective
from vllm_compress.operations.capacity.throughput.performance import roofline

CHAT = (1000, 200, 8192)


def demand(rate: float, ttft: float, tpot: float, share: float = 0.95) -> Demand:
    return Demand(rate, *CHAT, (Objective("ttft", share, ttft), Objective("tpot", share, tpot)))


@lru_cache
def scheme(model: str, recipe: str | None) -> Scheme:
    shape = load_shape(model)
    return as_it_is(shape) if recipe is None else apply_recipe(shape, recipe)


def answer(model: str, recipe: str | None, machine: str, asked: Demand) -> Option:
    return Planner(asked).option(scheme(model, recipe), find_hardware(machine))


def candidates(found: Scheme, machine: Hardware, asked: Demand) -> list[Candidate]:
    out = []
    for layout in layouts(machine):
        memory = fit(found, machine, layout, asked.context)
        if memory.reason is None:
            step = roofline(found, machine, layout)
            out.append(
                Candidate(memory, step, "roofline", capacity_of(step, asked, machine, memory))
            )
    return out


@pytest.mark.parametrize(("machine", "devices"), [("h100-80gb", 4), ("l40s", 48)])
def test_the_answer_is_what_the_simulator_finds(machine: str, devices: int) -> None:
    """It was 15 H100, and none for L40S."""
    found = answer("llama-3.1-70b", "int4-gptq", machine, demand(5, 0.5, 0.1))
    assert found.meets
    assert found.devices == devices


@pytest.mark.parametrize(
    ("model", "recipe", "machine", "asked"),
    [
        ("llama-3.1-70b", "int4-gptq", "h100-80gb", demand(5, 0.5, 0.1)),
        ("llama-3.1-8b", None, "l4", demand(3, 1.0, 0.08)),
        ("llama-4-scout", "int8", "h100-80gb", demand(30, 0.4, 0.05)),
    ],
)
def test_no_split_does_with_fewer_devices(
    model: str, recipe: str | None, machine: str, asked: Demand
) -> None:
    """Every split and every number of replicas below the answer, each simulated."""
    chosen = answer(model, recipe, machine, asked)
    assert chosen.meets
    hardware = find_hardware(machine)
    search = Search(asked, hardware)
    for candidate in candidates(scheme(model, recipe), hardware, asked):
        fewest = candidate.fewest(asked.rate)
        for replicas in range(fewest, -(-chosen.devices // candidate.devices)):
            assert not search.trial(candidate, replicas).meets, (candidate.found.layout, replicas)


RATES = st.sampled_from([0.2, 2.0, 9.0, 40.0])
TIGHTER = st.floats(0.5, 1)
MODELS = st.sampled_from([("llama-3.1-8b", "int4-gptq"), ("llama-3.1-8b", None)])


@settings(max_examples=12)
@given(
    MODELS, RATES, st.floats(0.15, 2), st.floats(0.02, 0.2), st.floats(0.5, 1), st.floats(0.5, 1)
)
def test_a_tighter_objective_takes_no_fewer_devices(
    model: tuple[str, str | None], rate: float, ttft: float, tpot: float, a: float, b: float
) -> None:
    loose = answer(*model, "l4", demand(rate, ttft, tpot))
    tight = answer(*model, "l4", demand(rate, a * ttft, b * tpot))
    if tight.meets:
        assert loose.meets
        assert tight.devices >= loose.devices
    for found in (loose, tight):
        if found.meets:
            assert found.capacity >= found.tokens_per_second


@settings(max_examples=12)
@given(MODELS, RATES, st.floats(0.3, 2), st.floats(0.5, 0.9))
def test_a_higher_percentile_takes_no_fewer_devices(
    model: tuple[str, str | None], rate: float, ttft: float, share: float
) -> None:
    loose, tight = (
        answer(*model, "l4", demand(rate, ttft, 0.1, each)) for each in (share, share + 0.09)
    )
    assert not tight.meets or (loose.meets and tight.devices >= loose.devices)


@dataclass(frozen=True)
class Slow:
    """A step of a tenth of a second, whatever is in it."""

    request_seconds: float = 0.0

    def effective(self, length: float) -> float:
        return length

    def seconds(self, tokens: int, sampled: int, context: float, pairs: float) -> float:
        return 0.1


def fixed(rate: float) -> tuple[Search, Candidate]:
    """An engine that answers 128 requests at once, 100 tokens each at 10 per second."""
    machine = replace(find_hardware("l4"), kind="cpu")
    cache = Cache(16, 1, ((1, None, False),), 0)
    memory = Fit(Layout(), cache=cache, pool=128 * cache.blocks(110))
    asked = Demand(rate, 10, 100, 110, (Objective("ttft", 0.95, 600.0),))
    capacity = capacity_of(Slow(), asked, machine, memory)
    return Search(asked, machine), Candidate(memory, Slow(), "", capacity)


def test_replicas_never_fall_short_of_the_demand() -> None:
    """128 at once for 10 s each are 12.8 per second: 150 take 12 replicas, not 11."""
    search, candidate = fixed(150.0)
    assert candidate.capacity == pytest.approx(12.8)
    search.run([candidate])
    assert search.best is not None
    assert search.best.replicas == 12


def test_a_queue_that_grows_meets_nothing() -> None:
    """The bound of ten minutes holds for all that are simulated, and not for those after them."""
    search, candidate = fixed(15.0)
    trial = search.trial(candidate, 1)
    assert trial.latencies.ttft["p95"] < 600
    assert not trial.meets
    assert "queue grows" in trial.reason
    search, candidate = fixed(11.0)
    assert search.trial(candidate, 1).meets


def test_reasons_do_not_contradict_the_answer() -> None:
    """No split is left out for a number of devices that is below the answer's."""
    chosen = answer("llama-3.1-70b", "int4-gptq", "h100-80gb", demand(5, 0.5, 0.1))
    for rejected in chosen.rejected:
        needs = rejected.reason.split(" devices, for this rate")[0].split()[-1]
        if rejected.reason.endswith("for this rate"):
            assert int(needs) >= chosen.devices
