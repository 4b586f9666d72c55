"""Joules per token of both servers, from what their /metrics count while they answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compress_methods.evaluation.statistics import ratio_of_rates
from tests.unit.vllm_compress.operations.abtest.conftest import COUNT, Compare
from tests.unit.vllm_compress.operations.abtest.streaming_server import Server, running
from vllm_compress.operations.abtest.replay import energy
from vllm_compress.operations.abtest.replay.client import Server as Served
from vllm_compress.operations.abtest.replay.energy import Reading, measure_energy, read_energy
from vllm_compress.operations.abtest.replay.replay import ANSWERS
from vllm_compress.operations.abtest.scoring.judge import LEAST_PAIRS

MARGINS = ("--margin", "errors=0.2", "--margin", "empty=0.2")
"""What so few prompts can tell."""
PAIR = tuple(Served(side, f"http://{side}:8000", "m", "m", {}, None) for side in "ab")


def test_joules_per_token_are_those_of_the_blocks(
    compare: Compare, servers: tuple[Server, Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(energy, "PERIOD_SECONDS", 0.02)
    a, b = servers
    a.joules_per_token, b.joules_per_token, b.device = 4.0, 1.0, "gpu-1"
    a.delay = b.delay = 0.02
    assert compare(a, b, "--logprobs", 0, *MARGINS, "--margin", "joules=0.5") == 0
    row = compare.metric("joules")
    assert (row["a"], row["b"], row["unit"]) == (4.0, 1.0, "J")
    assert row["value"] == pytest.approx(0.25)
    assert row["low"] == pytest.approx(0.25)  # every block says the same
    assert row["high"] == pytest.approx(0.25)
    assert row["n"] == COUNT
    assert row["verdict"] == "non-inferior"
    asked = len(a.seen)
    before = (compare.out / "journal.jsonl").read_text()
    compare(a, b, "--logprobs", 0, *MARGINS)  # judges again, asks nobody
    assert len(a.seen) == asked
    assert (compare.out / "journal.jsonl").read_text() == before


def test_a_short_run_has_values_and_no_interval(
    compare: Compare, servers: tuple[Server, Server]
) -> None:
    a, b = servers
    a.joules_per_token, b.joules_per_token, b.device = 2.0, 3.0, "gpu-1"
    compare(a, b, "--logprobs", 0)
    row = compare.metric("joules")
    assert (row["a"], row["b"], row["value"]) == (2.0, 3.0, None)
    assert row["note"] == f"needs {LEAST_PAIRS * energy.PERIOD_SECONDS:.0f} s of answers"


def test_a_device_that_both_use_says_nothing_of_either(
    compare: Compare, servers: tuple[Server, Server]
) -> None:
    a, b = servers
    a.joules_per_token = b.joules_per_token = 2.0
    compare(a, b, "--logprobs", 0)
    row = compare.metric("joules")
    assert (row["a"], row["value"], row["note"]) == (None, None, energy.SHARED)


def test_names_of_one_host_are_one_host() -> None:
    both = Reading({"package-0": 5.0}, 3)
    for url, shared in (("http://127.0.0.1:2", True), ("http://10.9.8.7:2", False)):
        pair = (Served("a", "http://localhost:1", "m", "m", {}, None),)
        pair += (Served("b", url, "m", "m", {}, None),)
        assert energy._share_devices(pair, both, both) is shared
    other = Reading({"gpu-1": 5.0}, 3)
    assert not energy._share_devices((pair[0], pair[0]), both, other)


def test_without_counters_on_both_sides_there_is_no_row(
    compare: Compare, servers: tuple[Server, Server]
) -> None:
    a, b = servers
    a.joules_per_token = 2.0
    compare(a, b, "--logprobs", 0)
    assert "joules" not in {row["metric"] for row in compare.report["metrics"]}
    assert '"energy"' not in (compare.out / "journal.jsonl").read_text()


def test_a_run_that_no_prompt_of_was_answered_leaves_nothing(
    compare: Compare, servers: tuple[Server, Server], prompts: Path
) -> None:
    a, b = servers
    a.joules_per_token, b.joules_per_token, b.device = 2.0, 3.0, "gpu-1"
    prompts.write_text(json.dumps({"prompt": "x" * 501}) + "\n")
    assert "answers no prompt" in compare.fails(a, b)
    assert not compare.out.exists()


def test_energy_of_all_devices_adds_up_and_other_series_do_not_count() -> None:
    with running(Server()) as server:
        served = Served("a", server.url, "m", "m", {}, None)
        assert read_energy(served) is None
        server.metrics = "".join(
            f'vllm_compress_energy_joules_total{{deployment="d",device="{device}"}} {joules}\n'
            for device, joules in (("gpu-0", 5.0), ("gpu-1", 7.0))
        )
        server.metrics += 'vllm_compress_generation_tokens_total{deployment="d"} 3.0\n'
        assert read_energy(served) == Reading({"gpu-0": 5.0, "gpu-1": 7.0}, 3.0)
    assert read_energy(served) is None  # gone


@pytest.mark.parametrize(
    ("before", "now", "used"),
    [
        (Reading({"x": 5.0}, 3), Reading({"x": 9.0}, 4), {"joules": {"x": 4.0}, "tokens": 1}),
        (Reading({"x": 5.0}, 3), Reading({"x": 2.0}, 1), None),  # started again
        (Reading({"x": 5.0}, 3), None, None),
        (Reading({"x": 5.0, "y": 1.0}, 3), Reading({"x": 6.0}, 4), None),
        (
            Reading({"x": 5.0}, 3),
            Reading({"x": 6.0, "y": 2.0}, 4),
            {"joules": {"x": 1.0, "y": 2.0}, "tokens": 1},
        ),
    ],
)
def test_what_lies_between_two_readings(
    before: Reading | None, now: Reading | None, used: object
) -> None:
    assert energy._used(before, now) == used


def test_what_is_needed_is_said_in_prompts() -> None:
    """Blocks of forty prompts each: a standard error of n prompts is that of n / 40 blocks."""
    lines: dict[str, dict[str, dict[str, object]]] = {}
    for i in range(LEAST_PAIRS):
        side = {"joules": {"gpu-0": 100.0 + 10 * (i % 3)}, "tokens": 50.0}
        lines[str(i)] = {"a": side, "b": {"joules": {"gpu-0": 90.0 + 20 * (i % 2)}, "tokens": 50.0}}
    answers: dict[str, dict[str, object]] = {str(i): {} for i in range(40 * LEAST_PAIRS)}
    records = {energy.ENERGY: lines, ANSWERS: answers}
    (row,) = measure_energy(PAIR, records, 0.95)  # type: ignore[arg-type]
    blocks = [[line[side] for line in lines.values()] for side in "ab"]
    sums = [energy._sums([Reading(**b) for b in side]) for side in blocks]  # type: ignore[arg-type]
    plain = ratio_of_rates(sums[0], sums[1], 0.95, serial=True)
    assert row.estimate is not None
    assert row.estimate.n == 40 * LEAST_PAIRS
    assert (row.estimate.low, row.estimate.high) == (plain.low, plain.high)
    assert row.estimate.standard_error(800) == plain.standard_error(20)


def test_blocks_of_no_tokens_at_all_are_no_rate() -> None:
    block = {"joules": {"gpu-0": 5.0}, "tokens": 0.0}
    lines = {str(i): {"a": block, "b": block} for i in range(8)}
    assert measure_energy(PAIR, {energy.ENERGY: lines}, 0.95) == []  # type: ignore[arg-type]
