"""Free memory is what the machine and every limit of the process leave."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from compress_methods.system import memory

MIB = 2**20


class Machine:
    """A machine with 1000 MiB available and the limits that a test gives."""

    def __init__(self, folder: Path) -> None:
        self.cgroups = folder / "cgroup"
        self.own = folder / "own"
        self.cgroups.mkdir()

    def limit(self, group: str, most: str, used: int, inactive: int) -> None:
        folder = self.cgroups / group
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text(f"{most}\n")
        (folder / "memory.current").write_text(f"{used * MIB}\n")
        lines = ("anon 5", f"file {used * MIB}", f"inactive_file {inactive * MIB}", "slab 7")
        (folder / "memory.stat").write_text("\n".join(lines) + "\n")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    found = Machine(tmp_path)
    monkeypatch.setattr(memory, "CGROUPS", found.cgroups)
    monkeypatch.setattr(memory, "OWN_CGROUP", found.own)
    there = SimpleNamespace(available=1000 * MIB)
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: there)
    return found


def test_without_cgroups_the_machine_decides(machine: Machine) -> None:
    assert memory.available_bytes() == 1000 * MIB


def test_a_container_sees_its_limit(machine: Machine) -> None:
    machine.own.write_text("0::/\n")
    machine.limit("", str(500 * MIB), used=200, inactive=0)
    assert memory.available_bytes() == 300 * MIB


def test_the_page_cache_does_not_count_as_used(machine: Machine) -> None:
    machine.own.write_text("0::/\n")
    machine.limit("", str(500 * MIB), used=480, inactive=400)
    assert memory.available_bytes() == 420 * MIB


def test_a_limit_counts_without_its_statistics(machine: Machine) -> None:
    machine.limit("", str(500 * MIB), used=480, inactive=400)
    (machine.cgroups / "memory.stat").unlink()
    assert memory.available_bytes() == 20 * MIB


def test_a_limit_above_what_the_machine_has_changes_nothing(machine: Machine) -> None:
    machine.own.write_text("0::/\n")
    machine.limit("", str(5000 * MIB), used=200, inactive=0)
    assert memory.available_bytes() == 1000 * MIB


def test_no_limit_changes_nothing(machine: Machine) -> None:
    machine.own.write_text("0::/\n")
    machine.limit("", "max", used=200, inactive=0)
    assert memory.available_bytes() == 1000 * MIB


@pytest.mark.parametrize(("outer", "left"), [(400, 100), (900, 200)])
def test_the_tightest_limit_on_the_way_to_the_root_counts(
    machine: Machine, outer: int, left: int
) -> None:
    machine.own.write_text("4:memory:/elsewhere\n0::/user.slice/job.scope\n")
    machine.limit("user.slice", str(outer * MIB), used=300, inactive=0)
    machine.limit("user.slice/job.scope", str(250 * MIB), used=50, inactive=0)
    machine.limit("elsewhere", str(MIB), used=0, inactive=0)
    assert memory.available_bytes() == left * MIB


def test_over_the_limit_there_is_nothing_left(machine: Machine) -> None:
    machine.own.write_text("0::/\n")
    machine.limit("", str(500 * MIB), used=510, inactive=0)
    assert memory.available_bytes() == 0


def test_the_peak_stays_when_memory_is_given_back() -> None:
    before = memory.peak_bytes()
    now = memory.psutil.Process().memory_info().rss
    held = torch.ones((before - now + 256 * MIB) // 4)
    peak = memory.peak_bytes()
    assert peak - before > 200 * MIB
    del held
    assert abs(memory.peak_bytes() - peak) < 8 * MIB  # the kernel counts a little late
