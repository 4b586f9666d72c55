"""The machines of `configs/hardware.yaml`, and the one this runs on.

`local` is this machine: memory as the kernel says, bandwidth and fp32 arithmetic measured for half
a second, both optimistic for a busy machine.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from compress_methods.errors import CompressError, nearest
from compress_methods.registry import build_dataclass
from compress_methods.system.resources import config_path
from compress_methods.system.user_file import read_yaml

LOCAL = "local"
GIB = 2**30
VERSION = 1
KINDS = ("gpu", "cpu")
ARCHITECTURE = re.compile(r"(?P<nvidia>sm(?P<capability>\d{2,3}))|gfx\w+")
DATE = re.compile(r"\b20\d\d-\d\d-\d\d\b")
NOTES = ("aliases", "source", "checked")
"""Keys of an entry that say nothing of the machine itself."""


class HardwareError(CompressError):
    """A machine that is not in the table, or a price that is none."""


@dataclass(frozen=True)
class Hardware:
    """One device of a kind, or one CPU host. `teraops` by dtype, dense.

    `link_bytes_per_s` is what one device sends to the others of its host; `per_host` how many share
    it, so the largest tensor-parallel size. `watts` is the rated power. `architecture` is of a GPU:
    sm90, gfx942. `posted_price` is in US dollars, as `posted_by` says.
    """

    key: str
    name: str
    kind: str
    memory_bytes: int
    bandwidth_bytes_per_s: float
    teraops: Mapping[str, float]
    watts: float | None = None
    price_per_hour: float | None = None
    link_bytes_per_s: float = 32e9
    per_host: int = 8
    architecture: str | None = None
    posted_price: float | None = None
    posted_by: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise HardwareError(f"kind is {self.kind!r}, expected {' or '.join(KINDS)}")
        for name in ("memory_bytes", "bandwidth_bytes_per_s", "link_bytes_per_s", "per_host"):
            _require_amount(getattr(self, name), name)
        if self.watts is not None:
            _require_amount(self.watts, "watts")
        if self.price_per_hour is not None and not 0 <= self.price_per_hour < math.inf:
            raise HardwareError(f"price_per_hour is {self.price_per_hour}, expected a price")
        if self.kind == "gpu" and not ARCHITECTURE.fullmatch(self.architecture or ""):
            raise HardwareError(
                f"architecture is {self.architecture!r}, expected sm90, gfx942 or the like"
            )
        if self.posted_price is not None:
            _require_amount(self.posted_price, "posted_price")
            if not DATE.search(self.posted_by):
                raise HardwareError(f"posted_by is {self.posted_by!r:.80}, expected who and a date")
        if not isinstance(self.teraops, Mapping):
            raise HardwareError(f"teraops is {self.teraops!r:.80}, expected a mapping of dtypes")
        for dtype, rate in self.teraops.items():
            _require_amount(rate, f"teraops.{dtype}")

    def rate(self, *dtypes: str) -> float:
        """Peak operations per second in the first of the dtypes that is accelerated here."""
        return 1e12 * next((self.teraops[d] for d in dtypes if d in self.teraops), 0.0)

    @property
    def capability(self) -> int | None:
        """Compute capability of an NVIDIA GPU, 90 for 9.0; None of all else."""
        known = ARCHITECTURE.fullmatch(self.architecture or "")
        return int(known["capability"]) if known is not None and known["nvidia"] else None

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


def _require_amount(value: Any, name: str) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf:
        raise HardwareError(f"{name} is {value!r:.80}, expected a number above 0")


@lru_cache
def _table() -> tuple[dict[str, Hardware], dict[str, str]]:
    return read_hardware(config_path("hardware.yaml"))


def read_hardware(path: Path) -> tuple[dict[str, Hardware], dict[str, str]]:
    """Machines by key, and the key of every name; `HardwareError` names file and key."""
    block = read_yaml(path, HardwareError)
    listed = block.get("hardware") if isinstance(block, dict) else None
    if not isinstance(listed, dict) or block.get("version") != VERSION:
        raise HardwareError(f"{path}: expected version: {VERSION} and a mapping `hardware`")
    machines: dict[str, Hardware] = {}
    names: dict[str, str] = {}
    for key, entry in listed.items():
        where = f"{path}: hardware.{key}"
        if not isinstance(key, str) or not isinstance(entry, dict):
            raise HardwareError(f"{where}: expected a name with a mapping, found {entry!r:.80}")
        fields = {k: v for k, v in entry.items() if k not in NOTES}
        machines[key] = build_dataclass(Hardware, {"key": key, **fields}, where, HardwareError)
        aliases = entry.get("aliases") or []
        if not isinstance(aliases, list) or not all(isinstance(a, str) for a in aliases):
            raise HardwareError(f"{where}: aliases is {aliases!r:.80}, expected a list of names")
        names |= dict.fromkeys([key, *aliases], key)
    return machines, names


def hardware_names() -> list[str]:
    """List everything that `find_hardware` takes."""
    return sorted([*_table()[1], LOCAL])


def find_hardware(name: str, option: str = "--hardware") -> Hardware:
    """Find a machine by key or alias; raises `HardwareError` naming the nearest."""
    machines, names = _table()
    if name == LOCAL:
        return _local()
    if name not in names:
        raise HardwareError(f"{option}: unknown {name!r}; {nearest(name, hardware_names())}")
    return machines[names[name]]


def with_prices(
    machines: list[Hardware], prices: list[str], file: Path | None = None
) -> list[Hardware]:
    """Set prices per device-hour from a file of them and, over it, from `NAME=2.5`; raises
    `HardwareError`. Where nobody has a price for any machine, those that providers posted."""
    found = {} if file is None else read_prices(file)
    for text in prices:
        name, _, value = text.partition("=")
        try:
            price = float(value)
        except ValueError:
            price = -1.0
        if not 0 <= price < math.inf:
            raise HardwareError(f"--price {text!r}: expected NAME=PRICE per device-hour")
        found[find_hardware(name, "--price").key] = price
    priced = [replace(m, price_per_hour=found.get(m.key, m.price_per_hour)) for m in machines]
    if any(m.price_per_hour is not None for m in priced):
        return priced
    return [replace(m, price_per_hour=m.posted_price) for m in priced]


def posted_note(machines: Sequence[Hardware]) -> str:
    """What to tell of prices that are not the user's; empty where all are."""
    posted = [m for m in machines if m.price_per_hour is not None and m.posted_by]
    if not posted or any(m.price_per_hour != m.posted_price for m in posted):
        return ""
    said = "; ".join(f"{m.key} {m.posted_price:g} ({m.posted_by})" for m in posted)
    return f"prices in US dollars of a device-hour, as posted: {said}; --price has yours"


def read_prices(path: Path) -> dict[str, float]:
    """Prices per device-hour by machine, of a YAML file with `NAME: PRICE` in each line: one for
    every market, such as spot; raises `HardwareError`."""
    block = read_yaml(path, HardwareError)
    if not isinstance(block, dict):
        raise HardwareError(f"{path}: expected lines of NAME: PRICE, found {block!r:.80}")
    found: dict[str, float] = {}
    for name, price in block.items():
        number = isinstance(price, int | float) and not isinstance(price, bool)
        if not number or not 0 <= price < math.inf:
            raise HardwareError(f"{path}: {name} is {price!r:.80}, expected a price")
        key = find_hardware(str(name), str(path)).key
        if key in found:
            raise HardwareError(f"{path}: {name} and another name of {key} both have a price")
        found[key] = float(price)
    return found


@lru_cache
def _local() -> Hardware:
    import psutil

    cores = len(os.sched_getaffinity(0))
    return Hardware(
        key=LOCAL,
        name=f"this machine ({cores} cores)",
        kind="cpu",
        memory_bytes=psutil.virtual_memory().total,
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
