"""What was measured of a deployment, as a file, and what follows for the time of a step.

A calibration says how long a step with n tokens takes (`tokens`), what more samples than one add
(`head`), what each cached token that is read adds (`per_context`) and each pair of query and key of
a prompt (`per_pair`), and what a request costs outside of steps. It is made by asking a server one
request at a time (`measure.py`) or from the history of its metrics (`history.py`).

The very deployment that was measured is planned with these numbers. Any other scheme or split on
the same hardware is planned with its roofline, corrected by how far the measured deployment is from
its own. Other hardware keeps the plain roofline: nothing was measured there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from compress_methods.errors import CompressError
from compress_methods.registry import build_dataclass
from compress_methods.system.user_file import read_json_value
from vllm_compress.operations.capacity.footprint.memory import Layout
from vllm_compress.operations.capacity.footprint.storage import Scheme
from vllm_compress.operations.capacity.hardware import LOCAL, Hardware
from vllm_compress.operations.capacity.throughput.performance import (
    Curve,
    MeasuredStep,
    ScaledStep,
    Step,
    roofline,
    windows_of,
)

VERSION = 1
SAME_BYTES = 0.02
OTHER_KERNEL = 0.2


class CalibrationSourceError(CompressError):
    """A calibration that cannot be had, or does not belong to what is planned."""


@dataclass(frozen=True)
class Calibration:
    """Measurements of one deployment. Times in seconds; `tokens` and `head` are [count, seconds].

    `weight_bytes` and `devices` say of what; `machine` are the figures of the hardware it ran on.
    `kv_tokens` is how many tokens the server's KV cache holds, where it says so.
    """

    source: str
    url: str
    model: str
    machine: dict[str, Any]
    weight_bytes: int
    tokens: list[list[float]]
    head: list[list[float]]
    per_context: float
    per_pair: float
    request_seconds: float
    devices: int = 1
    kv_tokens: int | None = None
    version: int = VERSION

    def covers(self, scheme: Scheme, machine: Hardware, layout: Layout) -> bool:
        """Tell whether it was measured on this deployment, as far as weights say."""
        same = abs(scheme.weight_bytes - self.weight_bytes) <= SAME_BYTES * self.weight_bytes
        return same and self.on(machine) and layout.devices == self.devices

    def on(self, machine: Hardware) -> bool:
        return bool(machine.key == self.machine["key"])

    def adapt(self, machine: Hardware) -> Hardware:
        """`local` as it was then: its figures are measured anew each time it is asked for."""
        if machine.key != LOCAL or not self.on(machine):
            return machine
        known = {field.name for field in fields(Hardware)}
        then = Hardware(**{k: v for k, v in self.machine.items() if k in known})
        return replace(then, price_per_hour=machine.price_per_hour)

    def measured(self, scheme: Scheme) -> MeasuredStep:
        return MeasuredStep(
            windows_of(scheme.shape),
            _rising(self.tokens, OTHER_KERNEL),
            _rising(self.head or [[1, 0.0]]),
            self.per_context,
            self.per_pair,
            self.request_seconds,
        )


def step_model(
    scheme: Scheme,
    machine: Hardware,
    layout: Layout,
    kv_value_bytes: int,
    calibration: Calibration | None,
    reference: Scheme | None,
) -> tuple[Step, str]:
    """Model how long steps take; the basis is `measured`, `scaled` or `roofline`.

    `reference` is the scheme the calibration was measured on, where it is known.
    """
    plain = roofline(scheme, machine, layout, kv_value_bytes)
    if calibration is None or not calibration.on(machine):
        return plain, "roofline"
    if calibration.covers(scheme, machine, layout):
        return calibration.measured(scheme), "measured"
    if reference is None:
        return plain, "roofline"
    then = roofline(reference, machine, Layout(calibration.devices), kv_value_bytes)
    return ScaledStep(plain, then, calibration.measured(reference)), "scaled"


def read_calibration(path: Path) -> Calibration:
    """Read a file that `--save-calibration` wrote; raises `CalibrationSourceError`."""
    if not path.exists():
        raise CalibrationSourceError(f"--calibrate: {path}: no such file")
    block = read_json_value(path, CalibrationSourceError)
    if not isinstance(block, dict) or block.get("version") != VERSION:
        found = block.get("version") if isinstance(block, dict) else type(block).__name__
        raise CalibrationSourceError(f"{path}: version is {found!r}, expected {VERSION}")
    found = build_dataclass(Calibration, block, str(path), CalibrationSourceError)
    # Times of the head are differences of two measured ones: noise makes some of them negative.
    least = {"tokens": 0.0, "head": -math.inf}
    for key, points in (("tokens", found.tokens), ("head", found.head)):
        for point in points:
            if not (
                isinstance(point, list)
                and len(point) == 2
                and _is_number(point[0], 0.0)
                and _is_number(point[1], least[key])
            ):
                raise CalibrationSourceError(
                    f"{path}: {key} has {point!r:.80}, expected [tokens, seconds]"
                )
    if not found.tokens or "key" not in found.machine:
        raise CalibrationSourceError(f"{path}: has no measurements (tokens) or no machine")
    return Calibration(**asdict(found))


def _is_number(value: Any, least: float) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value) and value >= least


def to_json(calibration: Calibration) -> str:
    """The text of a calibration file."""
    return json.dumps(asdict(calibration), indent=1) + "\n"


def _rising(points: Sequence[Sequence[float]], fall: float | None = None) -> Curve:
    """The rising curve nearest to measured points: neighbours in the wrong order are averaged
    (isotonic regression), unless the later one is lower by more than a share `fall`: that is no
    noise but another kernel. Never negative."""
    ordered = sorted((float(x), float(y)) for x, y in points)
    levels: list[tuple[float, int]] = []
    for _, y in ordered:
        level, count = y, 1
        while levels and level < levels[-1][0] and _alike(levels[-1][0], level, fall):
            before, n = levels.pop()
            level, count = (before * n + level * count) / (n + count), n + count
        levels.append((level, count))
    flat = [max(0.0, level) for level, count in levels for _ in range(count)]
    return Curve(tuple(zip((x for x, _ in ordered), flat, strict=True)))


def _alike(before: float, after: float, fall: float | None) -> bool:
    return fall is None or after >= (1 - fall) * before
