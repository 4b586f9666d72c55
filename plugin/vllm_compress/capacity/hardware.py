"""The machines of `configs/hardware.yaml`, and the one this runs on.

`local` is this machine: memory as the kernel says, bandwidth and fp32 arithmetic measured for half
a second, both optimistic for a busy machine.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from compress_methods.errors import CompressError, nearest
from compress_methods.resources import config_path

LOCAL = "local"
GIB = 2**30


class HardwareError(CompressError):
    """A machine that is not in the table, or a price that is none."""


@dataclass(frozen=True)
class Hardware:
    """One device of a kind, or one CPU host. `teraops` by dtype, dense.

    `link_bytes_per_s` is what one device sends to the others of its host; `per_host` how many share
    it, so the largest tensor-parallel size.
    """

    key: str
    name: str
    kind: str
    memory_bytes: int
    bandwidth_bytes_per_s: float
    teraops: Mapping[str, float]
    price_per_hour: float | None = None
    link_bytes_per_s: float = 32e9
    per_host: int = 8

    def rate(self, *dtypes: str) -> float:
        """Peak operations per second in the first of the dtypes that is accelerated here."""
        return 1e12 * next((self.teraops[d] for d in dtypes if d in self.teraops), 0.0)

    @property
    def max_tokens(self) -> int:
        """vLLM's default of --max-num-batched-tokens for its server."""
        if self.kind == "cpu" or self.memory_bytes < 70 * GIB or self.key.startswith("a100"):
            return 2048
        return 16384 if self.memory_bytes >= 160 * GIB else 8192

    @property
    def max_sequences(self) -> int:
        """vLLM's default of --max-num-seqs."""
        if self.kind == "cpu":
            return 128
        return 256 if self.max_tokens == 2048 else 1024


@lru_cache
def _table() -> tuple[dict[str, Hardware], dict[str, str]]:
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    block = yaml.load(config_path("hardware.yaml").read_text(encoding="utf-8"), loader)
    machines: dict[str, Hardware] = {}
    names: dict[str, str] = {}
    for key, entry in block["hardware"].items():
        fields = {k: v for k, v in entry.items() if k in Hardware.__dataclass_fields__}
        machines[key] = Hardware(key=key, **fields)
        names |= dict.fromkeys([key, *entry.get("aliases", ())], key)
    return machines, names


def hardware_names() -> list[str]:
    """Everything `find_hardware` takes."""
    return sorted([*_table()[1], LOCAL])


def find_hardware(name: str, option: str = "--hardware") -> Hardware:
    """By key or alias; raises `HardwareError` naming the nearest."""
    machines, names = _table()
    if name == LOCAL:
        return _local()
    if name not in names:
        raise HardwareError(f"{option}: unknown {name!r}; {nearest(name, hardware_names())}")
    return machines[names[name]]


def with_prices(machines: list[Hardware], prices: list[str]) -> list[Hardware]:
    """Prices per device-hour from `NAME=2.5`; raises `HardwareError`."""
    found: dict[str, float] = {}
    for text in prices:
        name, _, value = text.partition("=")
        try:
            price = float(value)
        except ValueError:
            price = -1.0
        if price < 0:
            raise HardwareError(f"--price {text!r}: expected NAME=PRICE per device-hour")
        found[find_hardware(name, "--price").key] = price
    return [replace(m, price_per_hour=found.get(m.key, m.price_per_hour)) for m in machines]


@lru_cache
def _local() -> Hardware:
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    memory = int(next(line.split()[1] for line in lines if line.startswith("MemTotal"))) * 1024
    cores = len(os.sched_getaffinity(0))
    return Hardware(
        key=LOCAL,
        name=f"this machine ({cores} cores)",
        kind="cpu",
        memory_bytes=memory,
        bandwidth_bytes_per_s=_read_rate(cores),
        teraops={"fp32": _multiply_rate() / 1e12},
        per_host=1,
    )


def _read_rate(cores: int) -> float:
    """Bytes per second that all cores together read."""
    import numpy as np

    blocks = [np.ones(32 * 2**20 // 8) for _ in range(cores)]
    with ThreadPoolExecutor(cores) as pool:
        return _best(lambda: list(pool.map(np.sum, blocks)), cores * blocks[0].nbytes)


def _multiply_rate() -> float:
    """Operations per second of a float32 matrix product."""
    import numpy as np

    a = np.ones((768, 768), np.float32)
    return _best(lambda: a @ a, 2 * 768**3)


def _best(work: Callable[[], Any], amount: float) -> float:
    best, until = float("inf"), time.perf_counter() + 0.25
    while time.perf_counter() < until:
        began = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - began)
    return amount / best
