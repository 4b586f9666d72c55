"""Points of cost and latency, and those that nothing beats."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from vllm_compress.operations.capacity.footprint.shapes import load_shape
from vllm_compress.operations.capacity.footprint.storage import apply_recipe
from vllm_compress.operations.capacity.hardware import find_hardware
from vllm_compress.operations.capacity.picture import SPAN, draw, frontier, points_of
from vllm_compress.operations.capacity.plan import Planner
from vllm_compress.operations.capacity.throughput.demand import Demand, Objective

PAIRS = st.lists(st.tuples(st.floats(1, 9), st.floats(1, 9)), min_size=1, max_size=12)


@given(PAIRS)
def test_the_frontier_is_what_no_point_beats(points: list[tuple[float, float]]) -> None:
    def beaten(point: tuple[float, float]) -> bool:
        return any(p != point and p[0] <= point[0] and p[1] <= point[1] for p in points)

    assert frontier(points) == sorted({point for point in points if not beaten(point)})


def test_points_are_the_answer_and_what_is_near_it(tmp_path: Path) -> None:
    scheme = apply_recipe(load_shape("llama-3.1-8b"), "int4-gptq")
    machine = replace(find_hardware("l4"), price_per_hour=0.5)
    objectives = (Objective("ttft", 0.95, 1.0), Objective("tpot", 0.95, 0.1))
    demand = Demand(6.0, 1000, 200, 8192, objectives)
    planner = Planner(demand)
    option = planner.option(scheme, machine)
    points = points_of(planner, scheme, machine, option)
    (answer,) = (p for p in points if (p.layout, p.replicas) == (option.layout, option.replicas))
    assert answer.meets
    assert answer.price_per_million == option.price_per_million
    assert option.latency is not None
    assert answer.ttft == option.latency.ttft["p95"]
    assert max(p.devices for p in points) <= SPAN * option.devices
    assert min(p.devices for p in points if p.meets) == option.devices
    assert {p.devices > option.devices for p in points if p.meets} == {True, False}
    drawn = tmp_path / "cost.png"
    draw(drawn, points, demand)
    assert drawn.read_bytes()[:4] == b"\x89PNG"
    unpriced = [replace(p, price_per_million=None) for p in points]
    draw(tmp_path / "devices.png", unpriced, demand)
    assert (tmp_path / "devices.png").read_bytes() != drawn.read_bytes()
