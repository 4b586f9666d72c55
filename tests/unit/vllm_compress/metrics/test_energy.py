"""Joules add up over wrap-around, sockets and API servers; what cannot be read is said once."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_compress.metrics import energy

RANGE_UJ = 65_532_610_987


def zone(root: Path, name: str, label: str, microjoules: int, wraps_at: int = RANGE_UJ) -> Path:
    """A RAPL zone as the kernel shows it; its counter."""
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{label}\n")
    (folder / "max_energy_range_uj").write_text(f"{wraps_at}\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    return folder / "energy_uj"


@given(st.integers(0, 1000), st.lists(st.integers(0, 999), max_size=30))
def test_steps_add_up_over_any_number_of_wraps(start: int, steps: list[int]) -> None:
    readings = [start % 1000]
    for step in steps:
        readings.append((readings[-1] + step) % 1000)
    total = sum(energy.used(a, b, 1000) for a, b in itertools.pairwise(readings))
    assert total == sum(steps)


def test_a_counter_without_a_range_that_fell_back_began_anew() -> None:
    assert energy.used(5000, 7, None) == 7


def test_packages_and_memory_are_metered_once(tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", 2_000_000)
    zone(tmp_path, "intel-rapl:0:0", "core", 1)
    zone(tmp_path, "intel-rapl:0:1", "dram", 500_000)
    zone(tmp_path, "intel-rapl:1", "package-1", 3_000_000)
    zone(tmp_path, "intel-rapl-mmio:0", "package-0", 9)
    zone(tmp_path, "intel-rapl:2", "psys", 9)
    found = {meter.device: meter.read() for meter in energy.rapl_meters(tmp_path)}
    assert found == {"package-0": 2.0, "package-0-dram": 0.5, "package-1": 3.0}


def test_nothing_to_read_is_nothing_to_say(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert energy.rapl_meters(tmp_path / "absent") == []
    assert energy.nvml_meters([]) == []
    before = threading.active_count()
    energy.count([], lambda device, joules: None)
    assert threading.active_count() == before
    assert not caplog.records


def test_zones_that_cannot_be_read_are_said_once_and_the_others_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", 1).unlink()
    zone(tmp_path, "intel-rapl:1", "package-1", 1).write_text("?")
    zone(tmp_path, "intel-rapl:2", "package-2", 3_000_000)
    zone(tmp_path, "intel-rapl:2:0", "core", 1).unlink()  # a part of package-2, never asked
    caplog.set_level("INFO", energy.logger.name)
    energy.logger.addHandler(caplog.handler)  # vLLM's loggers do not propagate
    try:
        found = [meter.device for meter in energy.rapl_meters(tmp_path)]
    finally:
        energy.logger.removeHandler(caplog.handler)
    assert found == ["package-2"]
    (message,) = {record.getMessage() for record in caplog.records}
    assert "intel-rapl:0: No such file or directory (and 1 more)" in message


def test_a_meter_that_fails_stands_still_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(energy, "PERIOD_SECONDS", 0.01)
    monkeypatch.delenv(energy.SHARED_FOLDER, raising=False)
    first = zone(tmp_path, "intel-rapl:0", "package-0", 0, wraps_at=10_000_000)
    second = zone(tmp_path, "intel-rapl:1", "package-1", 0)
    joules = {"package-0": 0.0, "package-1": 0.0}
    end = threading.Event()

    def add(device: str, more: float) -> None:
        joules[device] += more

    def until(device: str, expected: float) -> None:
        deadline = time.monotonic() + 10
        while joules[device] != pytest.approx(expected) and time.monotonic() < deadline:
            time.sleep(0.005)
        assert joules[device] == pytest.approx(expected)

    thread = threading.Thread(target=energy._follow, args=(energy.rapl_meters(tmp_path), add, end))
    thread.start()
    try:
        time.sleep(0.1)  # the first readings
        replace(first, 8_000_000)
        until("package-0", 8)
        replace(first, 1_000_000)  # past the range of 10 J
        until("package-0", 11)
        second.unlink()
        replace(first, 2_000_000)
        until("package-0", 12)
        assert joules["package-1"] == 0
    finally:
        end.set()
        thread.join(10)


def replace(path: Path, microjoules: int) -> None:
    """At once, as the kernel's file never shows half a number."""
    new = path.with_name("new")
    new.write_text(str(microjoules))
    new.replace(path)


SERVER = """
import sys
from pathlib import Path
from vllm_compress.metrics import energy
from vllm_compress.metrics.series import series
energy.PERIOD_SECONDS = 0.05
meters = energy.rapl_meters(Path(sys.argv[1]))
energy.count(meters, lambda device, joules: series().energy.labels("d", device).inc(joules))
print("started", flush=True)
sys.stdin.read()
"""


def test_one_api_server_counts_and_another_takes_over(tmp_path: Path) -> None:
    from prometheus_client import CollectorRegistry
    from prometheus_client.multiprocess import MultiProcessCollector

    shared = tmp_path / "shared"
    shared.mkdir()
    counter = zone(tmp_path, "intel-rapl:0", "package-0", 0)
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(shared))

    def total() -> float:
        labels = {"deployment": "d", "device": "package-0"}
        return registry.get_sample_value("vllm_compress_energy_joules_total", labels) or 0.0

    def run_to(microjoules: int, expected: float) -> None:
        """Move the meter, wait for what is expected, and a little for what is not."""
        time.sleep(0.5)
        replace(counter, microjoules)
        deadline = time.monotonic() + 10
        while total() < expected and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.3)
        assert total() == pytest.approx(expected)

    env = os.environ | {energy.SHARED_FOLDER: str(shared)}
    command = [sys.executable, "-c", SERVER, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with (
        subprocess.Popen(command, env=env, **pipes) as one,
        subprocess.Popen(command, env=env, **pipes) as two,
    ):
        for process in (one, two):
            assert process.stdout is not None
            assert process.stdout.readline() == b"started\n"
        run_to(4_000_000, 4)  # not 8
        one.kill()
        one.wait()
        run_to(6_000_000, 6)
        two.kill()


def test_gpu_energy_grows_as_a_plausible_power() -> None:
    nvml = pytest.importorskip("vllm.third_party.pynvml")
    try:
        nvml.nvmlInit()
        nvml.nvmlDeviceGetTotalEnergyConsumption(nvml.nvmlDeviceGetHandleByIndex(0))
    except nvml.NVMLError as problem:
        assert energy.nvml_meters([0]) == []
        pytest.skip(f"no GPU whose energy can be read: {problem}")
    (meter,) = energy.nvml_meters([0])
    before = meter.read()
    time.sleep(1)
    assert 1 < meter.read() - before < 3000  # watts
