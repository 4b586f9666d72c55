"""Energy that a deployment's devices use, as a counter that only grows.

GPUs: NVML's total since the driver was loaded (Volta and later). CPU hosts: RAPL's `package` and
`dram` zones under /sys/class/powercap, which wrap around at a range the kernel states. Both meter
whole devices: what else runs there is in it. Where there is nothing to read (most virtual machines)
there is no meter. What is there and cannot be read (since Linux 5.10 RAPL is root's alone) is said
once, and the server goes on.

One thread reads once a second, outside steps and scrapes: a scrape runs in the server's event loop,
and with several API servers it sees only what they wrote to prometheus' files. A file lock lets one
of them count; the others wait for it to go.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

logger = logging.getLogger("vllm.vllm_compress.energy")

POWERCAP = Path("/sys/class/powercap")
ZONES = ("package", "dram")
SHARED_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
LOCK = "vllm_compress_energy.lock"
PERIOD_SECONDS = 1.0


@dataclass(frozen=True)
class Meter:
    """`read` gives joules since some moment in the past, below `wraps_at` where that is known."""

    device: str
    read: Callable[[], float]
    wraps_at: float | None = None


def used(before: float, now: float, wraps_at: float | None) -> float:
    """Joules between two readings; a counter that fell back wrapped around, or began anew."""
    if now >= before:
        return now - before
    return now if wraps_at is None else now + wraps_at - before


def rapl_meters(root: Path = POWERCAP) -> list[Meter]:
    """Meter every socket whose zones can be read. `intel-rapl-mmio` shows the same again."""
    meters, problems = [], []
    for zone in sorted(root.glob("intel-rapl:*")):
        try:
            meter = _zone_meter(zone)
        except (OSError, ValueError) as problem:
            problems.append(f"{zone}: {_why(problem)}")
            continue
        if meter is not None:
            meters.append(meter)
    if problems:
        others = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        logger.warning("energy is not counted of %s%s", problems[0], others)
    return meters


def _zone_meter(zone: Path) -> Meter | None:
    """The meter of a zone, None for those that are a part of another one."""
    name = _text(zone / "name")
    if not name.startswith(ZONES):
        return None
    package = zone.name.split(":")[1]
    device = name if name.startswith("package") else f"package-{package}-{name}"
    wraps_at = int(_text(zone / "max_energy_range_uj")) / 1e6
    return _readable(Meter(device, _microjoules(zone / "energy_uj"), wraps_at))


def _why(problem: Exception) -> str:
    """Say what failed, without the path that a message has already."""
    return getattr(problem, "strerror", None) or str(problem) or type(problem).__name__


def _microjoules(path: Path) -> Callable[[], float]:
    return lambda: int(_text(path)) / 1e6


def _text(path: Path) -> str:
    return path.read_text(encoding="ascii").strip()


def nvml_meters(gpus: Sequence[int]) -> list[Meter]:
    """Meter GPUs by NVML's index; empty unless all can be read, as a part would mislead."""
    if not gpus:
        return []
    try:
        from vllm.third_party import pynvml as nvml

        nvml.nvmlInit()
        return [_readable(_nvml_meter(nvml, gpu)) for gpu in gpus]
    except Exception as problem:  # pynvml's errors are not ours to import
        logger.warning("energy of GPUs is not counted: %s", _why(problem))
        return []


def _nvml_meter(nvml: Any, gpu: int) -> Meter:
    handle = nvml.nvmlDeviceGetHandleByIndex(gpu)
    return Meter(f"gpu-{gpu}", lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3)


def _readable(meter: Meter) -> Meter:
    meter.read()
    return meter


def count(meters: Sequence[Meter], add: Callable[[str, float], None]) -> None:
    """Call `add(device, joules)` as the meters move, for as long as this process lives."""
    if meters:
        arguments = (list(meters), add, threading.Event())
        threading.Thread(target=_follow, args=arguments, name="energy", daemon=True).start()


def _follow(meters: list[Meter], add: Callable[[str, float], None], end: threading.Event) -> None:
    """Add readings until `end` is set. A meter that can no longer be read stands still."""
    with contextlib.suppress(Exception), _alone():
        before = {meter.device: meter.read() for meter in meters}
        while meters and not end.wait(PERIOD_SECONDS):
            for meter in list(meters):
                try:
                    now = meter.read()
                except Exception as problem:
                    logger.warning(
                        "energy is no longer counted of %s: %s", meter.device, _why(problem)
                    )
                    meters.remove(meter)
                    continue
                add(meter.device, used(before[meter.device], now, meter.wraps_at))
                before[meter.device] = now


@contextlib.contextmanager
def _alone() -> Any:
    """Wait until no other API server of this deployment counts."""
    folder = os.environ.get(SHARED_FOLDER)
    if not folder:
        yield
        return
    with open(Path(folder) / LOCK, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
