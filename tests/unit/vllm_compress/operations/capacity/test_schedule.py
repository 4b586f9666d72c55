"""A day of replicas: enough in every hour, and sums that add up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from vllm_compress.operations.capacity.footprint.shapes import load_shape
from vllm_compress.operations.capacity.footprint.storage import apply_recipe
from vllm_compress.operations.capacity.hardware import find_hardware
from vllm_compress.operations.capacity.plan import Planner
from vllm_compress.operations.capacity.report import render_day
from vllm_compress.operations.capacity.schedule import (
    HOURS,
    Hour,
    ProfileError,
    Schedule,
    plan_day,
    read_profile,
    scaled,
)
from vllm_compress.operations.capacity.throughput.demand import Demand, Objective

OBJECTIVES = (Objective("ttft", 0.95, 1.0), Objective("tpot", 0.95, 0.1))


def test_every_hour_has_what_a_plan_for_its_rate_has() -> None:
    scheme = apply_recipe(load_shape("llama-3.1-8b"), "int4-gptq")
    machine = replace(find_hardware("l4"), price_per_hour=0.5)
    planner = Planner(Demand(12.0, 1000, 200, 8192, OBJECTIVES))
    option = planner.option(scheme, machine)
    rates = [0.0, 1.0, 12.0, *[5.0] * 21]
    day = plan_day(planner, scheme, machine, option, rates)
    assert [hour.rate for hour in day.hours] == rates
    assert day.hours[0].replicas == 1  # ready for the first request
    assert day.hours[2].replicas == option.replicas
    for hour in day.hours[1:4]:
        assert hour.devices == hour.replicas * option.devices_per_replica
    alone = Planner(planner.demand.at_rate(5.0)).option(scheme, machine)
    assert day.hours[3].devices >= alone.devices  # another split may need fewer
    assert day.hours[1].replicas <= day.hours[3].replicas < day.hours[2].replicas
    watts = [hour.watts or 0 for hour in day.hours]
    assert watts[0] == pytest.approx(0.12 * 72 * option.devices_per_replica)
    assert watts[0] < watts[1] < watts[3] < watts[2] == pytest.approx(option.watts or 0)


def hours(*replicas: int) -> Schedule:
    found = tuple(Hour(float(n), n, 2 * n, 100.0 * n) for n in replicas)
    return Schedule("int4", "l4", found, 2 * max(replicas), 0.5)


def test_the_sums_of_a_day() -> None:
    found = hours(*[1] * 8, *[3] * 12, *[1] * 4).to_dict()
    assert found["device_hours"] == 12 * 2 + 12 * 6
    assert found["device_hours_at_peak"] == 24 * 6
    assert found["price_per_day"] == 48.0
    assert found["price_per_day_at_peak"] == 72.0
    assert found["kwh_per_day"] == pytest.approx(4.8)
    assert len(found["hours"]) == HOURS


def test_hours_alike_are_one_line() -> None:
    lines = render_day(hours(*[1] * 8, *[3] * 12, *[1] * 4)).splitlines()
    assert [line.split()[0] for line in lines if line[:2].isdigit()] == ["00-08", "08-20", "20-24"]
    assert lines[-1] == (
        "a day: 96 device-hours, not 144 as at the peak; 48.00, not 72.00 (67%); 4.8 kWh"
    )


def test_a_profile_is_a_list_or_a_table_in_any_order(tmp_path: Path) -> None:
    listed, table = tmp_path / "day.yaml", tmp_path / "day.csv"
    listed.write_text("".join(f"- {hour / 2}\n" for hour in range(HOURS)))
    table.write_text("hour,rate\n" + "".join(f"{h},{h / 2}\n" for h in reversed(range(HOURS))))
    assert read_profile(listed) == read_profile(table) == [hour / 2 for hour in range(HOURS)]
    assert max(scaled(read_profile(listed), 46.0)) == 46.0
    assert scaled([1.0, 2.0], 1.0) == [0.5, 1.0]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("d.yaml", "[1, 2]", "2 values, expected a list of 24 rates"),
        ("d.yaml", "a: 1", "expected a list of 24 rates"),
        ("d.yaml", str([1] * 23 + ["x"]), "hour 23 is 'x', expected requests per second"),
        ("d.yaml", str([-1] * 24), "hour 0 is -1"),
        ("d.yaml", str([0] * 24), "no hour has a request"),
        ("d.csv", "hour,rate\n0,1\n", "hour 1 is None"),
        ("d.csv", "hour,rate\n0,1\n0,2\n", ":3: hour '0', rate '2'; expected hours from 0 to 23"),
        ("d.csv", "hour,rate\n24,1\n", ":2: hour '24'"),
        ("d.csv", "a,b\n24,1\n", ":2: hour None, rate None"),
        ("none.csv", None, "no such file"),
        ("none.yaml", None, "no such file"),
    ],
)
def test_what_is_no_profile_is_named(
    tmp_path: Path, name: str, text: str | None, words: str
) -> None:
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises(ProfileError) as found:
        read_profile(path)
    assert words in str(found.value)
    assert str(path) in str(found.value)
