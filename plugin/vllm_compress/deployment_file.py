"""The deployment file: one YAML file that says what is served, on what, and how well it must do.

    version: 1
    name: chat-int4                 # label `deployment` of every series
    service: chat                   # variants of one service compete; the name if left out
    variant: int4                   # a word; `full` is the uncompressed baseline
    model: ../../out/int4           # a directory, relative to this file, or a Hugging Face id
    device: {type: l4, count: 1, price_per_hour: 0.8}     # price of one device, any currency
    objectives: {ttft: 0.5, tpot: 0.05, target: 0.95}     # seconds; share that meets them
    vllm: {port: 8000, max-model-len: 4096}               # options of `vllm serve`

Only `version`, `name` and `model` are required. `device.type` is a key of configs/hardware.yaml or
a word of your own; the price of a known type may stand there instead. Left out, the variant is
`full` for a plain model and else the formats of the checkpoint, and stays open while there is no
checkpoint to look at. vLLM's options are not checked here: vLLM does that when it starts.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compress_methods.errors import CompressError, DeploymentError
from compress_methods.registry import build_dataclass
from compress_methods.resources import config_path
from compress_methods.yaml_file import read_yaml
from vllm_compress.deployment import check_name
from vllm_compress.served import METHOD, describe, quantization_method, variant_of

VERSION = 1
PARALLEL = ("tensor-parallel-size", "pipeline-parallel-size", "data-parallel-size")
# Said elsewhere in the file, or (`config`) a second file of options that would hide this one's.
NOT_OPTIONS = {"model": "model", "deployment": "name", "config": "vllm"}


@dataclass(frozen=True)
class Device:
    """What one deployment occupies: `count` devices of `type`, each at `price_per_hour`."""

    type: str | None = None
    count: int = 1
    price_per_hour: float | None = None

    def __post_init__(self) -> None:
        if self.type is not None:
            check_name(self.type, "type")
        if self.count < 1:
            raise DeploymentError(f"count is {self.count}, expected at least 1")
        price = self.price_per_hour
        if price is not None and not (math.isfinite(price) and price >= 0):
            raise DeploymentError(f"price_per_hour is {price}, expected a number from 0 up")


@dataclass(frozen=True)
class Objectives:
    """Latencies in seconds that the share `target` of requests must keep to; None is no objective.

    ttft: arrival to first token. tpot: mean time between the tokens of one request.
    """

    ttft: float | None = None
    tpot: float | None = None
    target: float = 0.95

    def __post_init__(self) -> None:
        if not self.seconds:
            raise DeploymentError("neither ttft nor tpot is given")
        for name, limit in self.seconds.items():
            if not 0 < limit <= 600:
                raise DeploymentError(
                    f"{name} is {limit:.12g}, expected seconds, above 0 and up to 600"
                )
        if not 0 < self.target < 1:
            raise DeploymentError(f"target is {self.target:.12g}, expected a share between 0 and 1")

    @property
    def seconds(self) -> dict[str, float]:
        """The objectives that are set, by name."""
        both = {"ttft": self.ttft, "tpot": self.tpot}
        return {name: float(limit) for name, limit in both.items() if limit is not None}


@dataclass(frozen=True)
class Deployment:
    """A validated deployment file. `model` is absolute, or a Hub id; `vllm` maps options, without
    their dashes in front, to values. `variant` is None where nobody knows yet."""

    name: str
    model: str
    service: str
    variant: str | None = None
    device: Device = field(default_factory=Device)
    objectives: Objectives | None = None
    vllm: Mapping[str, Any] = field(default_factory=dict)

    def vllm_arguments(self) -> list[str]:
        """The options as `vllm serve` takes them."""
        return [word for name, value in self.vllm.items() for word in _option(name, value)]

    def to_json(self) -> str:
        """One line that `from_json` reads."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Deployment:
        block = json.loads(text)
        block["device"] = Device(**block["device"])
        if block["objectives"] is not None:
            block["objectives"] = Objectives(**block["objectives"])
        return cls(**block)


@dataclass(frozen=True)
class _File:
    """The keys of the file and their types."""

    version: int
    name: str
    model: str
    service: str | None = None
    variant: str | None = None
    device: dict = field(default_factory=dict)
    objectives: dict | None = None
    vllm: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.version != VERSION:
            raise DeploymentError(f"version is {self.version}, expected {VERSION}")
        for key in ("name", "service", "variant"):
            if getattr(self, key) is not None:
                check_name(getattr(self, key), key)
        if not self.model:
            raise DeploymentError("model is empty, expected a directory or a Hugging Face id")


def load_deployment(path: str | Path) -> Deployment:
    """The deployment that a YAML file describes; `DeploymentError` names the file and the key."""
    path = Path(path)
    if not path.is_file():
        raise DeploymentError(f"{path}: no such deployment file")
    return parse_deployment(read_yaml(path, DeploymentError), path)


def parse_deployment(block: Any, path: Path) -> Deployment:
    """Validate a file's mapping; paths in it are relative to the folder of `path`."""
    if not isinstance(block, Mapping):
        raise DeploymentError(f"{path}: expected a mapping, found {type(block).__name__}")
    raw: _File = build_dataclass(_File, block, str(path), DeploymentError)
    device = build_dataclass(Device, raw.device, f"{path}: device", DeploymentError)
    objectives = None
    if raw.objectives is not None:
        where = f"{path}: objectives"
        objectives = build_dataclass(Objectives, raw.objectives, where, DeploymentError)
    options = _options(raw.vllm, f"{path}: vllm")
    model = _locate(raw.model, path)
    return Deployment(
        name=raw.name,
        model=model,
        service=raw.service or raw.name,
        variant=raw.variant or _variant_of_model(model),
        device=_with_table(device, options, f"{path}: device"),
        objectives=objectives,
        vllm=options,
    )


def _locate(model: str, path: Path) -> str:
    """An absolute directory, unless it reads like a Hub id and no such directory is there."""
    place = Path(model).expanduser()
    place = place if place.is_absolute() else (path.parent / place).resolve()
    looks_like_a_path = model.startswith(("/", ".", "~")) or model.count("/") > 1
    return str(place) if looks_like_a_path or place.is_dir() else model


def _variant_of_model(model: str) -> str | None:
    directory = Path(model)
    if not directory.is_dir() or not (directory / "config.json").is_file():
        return None
    method = quantization_method(directory)
    formats = describe(model, method).formats
    return None if formats == METHOD else variant_of(formats)  # not readable (yet)


def _options(block: Mapping[Any, Any], where: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for key, value in block.items():
        if not isinstance(key, str) or not re.fullmatch(r"[a-z0-9]+([-_.][a-zA-Z0-9]+)*", key):
            raise DeploymentError(
                f"{where}: option {key!r}, expected one of vLLM's, such as max-model-len"
            )
        name = key.replace("_", "-")
        if name in NOT_OPTIONS:
            raise DeploymentError(f"{where}: {key} goes under the key {NOT_OPTIONS[name]!r}")
        if name in options:
            raise DeploymentError(f"{where}: {key} is given twice")
        if value is None:
            raise DeploymentError(f"{where}: {key} has no value; a switch is true or false")
        options[name] = value
    return options


def _option(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    if isinstance(value, Mapping):
        return [f"--{name}", json.dumps(value)]
    values = value if isinstance(value, list) else [value]
    return [f"--{name}", *map(str, values)]


def _with_table(device: Device, options: Mapping[str, Any], where: str) -> Device:
    """With the price that configs/hardware.yaml has; GPUs must be as many as vLLM will take."""
    known = _hardware().get(device.type or "", {})
    if known.get("kind") == "gpu":
        ranks = math.prod(_size(options, name, where) for name in PARALLEL)
        if ranks != device.count:
            raise DeploymentError(
                f"{where}: count is {device.count}, but vllm's parallel sizes take {ranks}; "
                "set tensor-parallel-size or count"
            )
    if device.price_per_hour is None and known.get("price_per_hour") is not None:
        return dataclasses.replace(device, price_per_hour=known["price_per_hour"])
    return device


def _size(options: Mapping[str, Any], name: str, where: str) -> int:
    size = options.get(name, 1)
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise DeploymentError(f"{where}: {name} is {size!r}, expected a whole number from 1 up")
    return size


def _hardware() -> dict[str, Any]:
    table: dict[str, Any] = read_yaml(config_path("hardware.yaml"), CompressError)["hardware"]
    return table
