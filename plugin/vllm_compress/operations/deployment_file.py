"""The deployment file: one YAML file that says what is served, on what, and how well it must do.

    version: 1
    name: chat-int4                 # label `deployment` of every series
    service: chat                   # variants of one service compete; the name if left out
    variant: int4                   # a word; `full` is the uncompressed baseline
    model: ../../out/int4           # a directory, relative to this file, or a Hugging Face id
    device: {type: l4, count: 1, price_per_hour: 0.8}     # price of one device, any currency
    objectives: {ttft: 0.5, tpot: 0.05, target: 0.95}     # seconds; share that meets them
    vllm: {port: 8000, max-model-len: 4096}               # options of `vllm serve`
    draft: ../../out/int3           # a smaller version of the model that writes tokens ahead
    draft_tokens: 3                 # how many; left out, what was measured of the draft decides;
                                    # "5,8:2,32:0": 5, from 8 requests at once on 2, then none

Only `version`, `name` and `model` are required. `device.type` is a key of configs/hardware.yaml or
a word of your own; the price of a known type may stand there instead. Left out, the variant is
`full` for a plain model and else the formats of the checkpoint, and stays open while there is no
checkpoint to look at. Whether vLLM has an option is checked by `serve`, which has vLLM at hand.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compress_methods.errors import CompressError, DeploymentError
from compress_methods.registry import build_dataclass
from compress_methods.system.user_file import read_yaml, require_path
from vllm_compress.metrics.checkpoint_summary import (
    quantization_method,
    summarize_checkpoint,
    variant_of,
)
from vllm_compress.metrics.deployment import Deployment, Device, Objectives, check_name
from vllm_compress.names import QUANT_METHOD
from vllm_compress.operations.capacity.hardware import LOCAL, find_hardware, hardware_names
from vllm_compress.operations.capacity.throughput.speculation import read_schedule

VERSION = 1
PARALLEL = ("tensor-parallel-size", "pipeline-parallel-size", "data-parallel-size")
# Said elsewhere in the file, or (`config`) a second file of options that would hide this one's.
NOT_OPTIONS = {"model": "model", "deployment": "name", "config": "vllm"}

__all__ = ["Deployment", "Device", "Objectives", "load_deployment", "parse_deployment"]


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
    draft: str | None = None
    draft_tokens: int | str | None = None

    def __post_init__(self) -> None:
        if self.version != VERSION:
            raise DeploymentError(f"version is {self.version}, expected {VERSION}")
        for key in ("name", "service", "variant"):
            if getattr(self, key) is not None:
                check_name(getattr(self, key), key)
        if not self.model:
            raise DeploymentError("model is empty, expected a directory or a Hugging Face id")
        if self.draft_tokens is not None:
            if self.draft is None:
                raise DeploymentError(f"draft_tokens is {self.draft_tokens}, expected a draft too")
            try:
                read_schedule(str(self.draft_tokens), "draft_tokens")
            except CompressError as problem:
                raise DeploymentError(str(problem)) from problem


def load_deployment(path: str | Path) -> Deployment:
    """The deployment that a YAML file describes; `DeploymentError` names the file and the key."""
    path = Path(path)
    require_path(path, DeploymentError)
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
        draft=None if raw.draft is None else _locate(raw.draft, path),
        draft_tokens=raw.draft_tokens,
    )


def _locate(model: str, path: Path) -> str:
    """An absolute directory, unless it reads like a Hub id and no such directory is there."""
    require_path(model, DeploymentError, f"{path}: model")
    place = Path(model).expanduser()
    place = place if place.is_absolute() else (path.parent / place).resolve()
    looks_like_a_path = model.startswith(("/", ".", "~")) or model.count("/") > 1
    return str(place) if looks_like_a_path or place.is_dir() else model


def _variant_of_model(model: str) -> str | None:
    directory = Path(model)
    if not directory.is_dir() or not (directory / "config.json").is_file():
        return None
    method = quantization_method(directory)
    formats = summarize_checkpoint(model, method).formats
    return None if formats == QUANT_METHOD else variant_of(formats)  # not readable (yet)


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


def _with_table(device: Device, options: Mapping[str, Any], where: str) -> Device:
    """With the price that configs/hardware.yaml has; GPUs must be as many as vLLM will take."""
    if device.type is None or device.type == LOCAL or device.type not in hardware_names():
        return device
    known = find_hardware(device.type)
    if known.kind == "gpu":
        ranks = math.prod(_size(options, name, where) for name in PARALLEL)
        if ranks != device.count:
            raise DeploymentError(
                f"{where}: count is {device.count}, but vllm's parallel sizes take {ranks}; "
                "set tensor-parallel-size or count"
            )
    if device.price_per_hour is None and known.price_per_hour is not None:
        return dataclasses.replace(device, price_per_hour=known.price_per_hour)
    return device


def _size(options: Mapping[str, Any], name: str, where: str) -> int:
    size = options.get(name, 1)
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise DeploymentError(f"{where}: {name} is {size!r}, expected a whole number from 1 up")
    return size
