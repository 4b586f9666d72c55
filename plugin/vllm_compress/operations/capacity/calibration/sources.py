"""A calibration from what the user names: a file, a served model, or a Prometheus."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllm_compress.metrics.series import NAMES
from vllm_compress.operations.capacity.calibration import history, measure
from vllm_compress.operations.capacity.calibration.fit import (
    Calibration,
    CalibrationSourceError,
    read_calibration,
)
from vllm_compress.operations.capacity.footprint.shapes import load_shape
from vllm_compress.operations.capacity.footprint.storage import Scheme, as_it_is
from vllm_compress.operations.capacity.hardware import Hardware, find_hardware, hardware_names
from vllm_compress.operations.prometheus import Prometheus


def load_calibration(
    source: str,
    schemes: Sequence[Scheme],
    machines: Sequence[Hardware],
    deployment: str | None = None,
    quiet: bool = False,
) -> Calibration:
    """Read a file, or measure at a URL. One machine alone says what the source may leave open."""
    if not source.startswith(("http://", "https://")):
        return read_calibration(Path(source))
    if history.is_prometheus(source):
        return _from_prometheus(source, schemes, machines, deployment)
    return _from_server(source, schemes, machines, quiet)


def reference_of(calibration: Calibration, schemes: Sequence[Scheme]) -> Scheme | None:
    """Find the scheme that was measured: one of those planned, or the directory served."""
    for scheme in schemes:
        same = abs(scheme.weight_bytes - calibration.weight_bytes)
        if same <= 0.02 * calibration.weight_bytes:
            return scheme
    directory = Path(calibration.model)
    return as_it_is(load_shape(str(directory))) if directory.is_dir() else None


def _from_server(
    url: str, schemes: Sequence[Scheme], machines: Sequence[Hardware], quiet: bool
) -> Calibration:
    """Ask the server itself: what it serves, then one request at a time."""
    client = measure.Client(url)
    served = measure.inspect_server(client)
    directory = Path(served.root)
    weights = served.weight_bytes
    if weights is None:
        known = as_it_is(load_shape(served.root)) if directory.is_dir() else schemes[0]
        weights = known.weight_bytes
    machine = _machine(url, served.device_type, machines)
    vocabulary = schemes[0].shape.vocabulary
    timings = measure.time_requests(client, served, vocabulary, measure.SECONDS, quiet)
    blocks, block = served.blocks, served.block
    return Calibration(
        source="requests",
        url=client.url,
        model=served.root,
        machine=_figures(machine),
        weight_bytes=weights,
        devices=served.devices,
        kv_tokens=None if blocks is None or block is None else blocks * block,
        **measure.numbers(timings),
    )


def _from_prometheus(
    url: str,
    schemes: Sequence[Scheme],
    machines: Sequence[Hardware],
    deployment: str | None,
) -> Calibration:
    """Take what Prometheus has recorded of one deployment."""
    prometheus = Prometheus(url)
    labels = history.choose_deployment(prometheus, deployment)
    name = labels["deployment"]
    weights = history.latest_value(prometheus, name, NAMES.weight_bytes)
    return Calibration(
        source="prometheus",
        url=prometheus.url,
        model=labels.get("model_name", name),
        machine=_figures(_machine(url, labels.get("device_type"), machines)),
        weight_bytes=int(weights) if weights else schemes[0].weight_bytes,
        devices=int(history.latest_value(prometheus, name, NAMES.devices) or 1),
        **history.numbers(prometheus, name),
    )


def _machine(url: str, device_type: str | None, machines: Sequence[Hardware]) -> Hardware:
    """Find what a server runs on: what it says, else the only machine planned for."""
    if device_type in hardware_names():
        assert device_type is not None
        return find_hardware(device_type)
    if len(machines) == 1:
        return machines[0]
    raise CalibrationSourceError(
        f"{url}: does not say what hardware it runs on; calibrate with that one as --hardware"
    )


def _figures(machine: Hardware) -> dict[str, Any]:
    found = asdict(machine)
    found.pop("price_per_hour")
    return {**found, "teraops": dict(machine.teraops)}
