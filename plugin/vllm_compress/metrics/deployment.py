"""A deployment: what tells it apart on a dashboard, what it runs on, what is expected of it.

It reaches vLLM's processes in one environment variable, because vLLM starts them anew and has no
other channel that stays out of the compile cache's key. The variable holds a bare name (set by hand
or by `serve --deployment`) or the whole deployment as JSON (set by `serve --config`). vLLM warns of
any `VLLM_*` variable it does not know, and refuses to start with `--fail-on-environ-validation`;
`declare_environment` makes ours known.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from compress_methods.errors import CompressError, DeploymentError
from vllm_compress.names import DEPLOYMENT_VARIABLE, VARIABLES

_VALID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/@:+-]{0,127}")


def check_name(name: str, what: str) -> str:
    """`name`, if it can be a label's value; `what` is where it was said."""
    if not _VALID.fullmatch(name):
        raise CompressError(
            f"{what} is {name!r}, expected up to 128 letters, digits and ._/@:+- "
            "that start with a letter or digit"
        )
    return name


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
    """What is served, on what, and how well it must do.

    `model` is an absolute path or a Hub id. `variant` is None where nobody knows yet. `vllm` maps
    options of `vllm serve`, without the dashes in front, to values. `draft` is a directory,
    `draft_tokens` how many tokens it writes ahead, see `operations/draft.py`.
    """

    name: str
    model: str
    service: str
    variant: str | None = None
    device: Device = field(default_factory=Device)
    objectives: Objectives | None = None
    vllm: Mapping[str, Any] = field(default_factory=dict)
    draft: str | None = None
    draft_tokens: int | str | None = None

    def vllm_arguments(self, without: Collection[str] = ()) -> list[str]:
        """The options as `vllm serve` takes them, those named in `without` left out."""
        left = {name: value for name, value in self.vllm.items() if name not in without}
        return [word for name, value in left.items() for word in _option(name, value)]

    def to_json(self) -> str:
        """One line that `from_json` reads."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Deployment:
        """Read what `to_json` wrote; raises `DeploymentError` for anything else."""
        try:
            block = json.loads(text)
            block["device"] = Device(**block["device"])
            if block["objectives"] is not None:
                block["objectives"] = Objectives(**block["objectives"])
            return cls(**block)
        except (ValueError, TypeError, KeyError) as problem:
            raise DeploymentError(
                f"{DEPLOYMENT_VARIABLE} is {text!r}, expected a deployment"
            ) from problem


def _option(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    if isinstance(value, Mapping):
        return [f"--{name}", json.dumps(value)]
    values = value if isinstance(value, list) else [value]
    return [f"--{name}", *map(str, values)]


def current_deployment(model: str, served_name: str) -> Deployment:
    """Read this process's deployment from the environment; else name it as it is served.

    Raises `DeploymentError` for JSON that `serve --config` did not write.
    """
    said = os.environ.get(DEPLOYMENT_VARIABLE, "").strip()
    if said.startswith("{"):
        return Deployment.from_json(said)
    name = said or served_name
    return Deployment(name=name, model=model, service=name)


def declare_environment() -> None:
    """Tell vLLM that our variables exist. Idempotent; for every process that reads a config."""
    from vllm import envs

    # Constants: what vLLM reads here enters the compile cache's key, and none changes a graph.
    for name in VARIABLES:
        envs.environment_variables.setdefault(name, _constant)


def _constant() -> None:
    return None
