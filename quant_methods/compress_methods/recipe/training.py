"""`train`: stages of a recipe that win back what compression lost, by gradients.

    - {train: scales, loss: kl, steps: 500, rate: 0.005, data: self}

`train` is `scales`, `distill` or `qat`, as `compress_methods.training` describes them. `loss` is
`kl`, `reverse_kl` or `{jsd: 0.5}`. `data` is `self` (the teacher writes it; `self:code` and the
like under prompts of that kind) or a file of text. Of `sequences` of `length` tokens the student
learns, `batch` at a time; `held_out` others decide when to stop, and as many again are reported on.
`rate` 0 is the method's own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from compress_methods.calibration.settings import SELF, CalibrationSettings
from compress_methods.errors import RecipeError, nearest
from compress_methods.registry import build_dataclass

TRAIN = "train"
SCALES, DISTILL, QAT = "scales", "distill", "qat"
RATES = MappingProxyType({SCALES: 0.005, DISTILL: 0.005, QAT: 0.002})
"""Of Adam, by method; a parameter's own size is 1."""
LOSSES = MappingProxyType({"kl": 0.0, "reverse_kl": 1.0})
"""The `beta` of `training/losses.py` that each is."""
JSD = "jsd"
LEAST = MappingProxyType(
    {"steps": 1, "batch": 1, "sequences": 1, "held_out": 1, "length": 8, "seed": 0}
)


@dataclass(frozen=True)
class Training:
    """One validated `train` stage; `beta` stands for its `loss`."""

    train: str
    beta: float = 0.0
    steps: int = 500
    rate: float = 0.0
    data: str = SELF
    batch: int = 8
    sequences: int = 512
    held_out: int = 16
    length: int = 256
    seed: int = 1

    def __post_init__(self) -> None:
        if self.train not in RATES:
            raise RecipeError(f"unknown train {self.train!r:.80}; {nearest(self.train, RATES)}")
        for key, least in LEAST.items():
            if getattr(self, key) < least:
                raise RecipeError(f"{key} is {getattr(self, key)}, expected {least} or more")
        if not (math.isfinite(self.rate) and self.rate >= 0):
            raise RecipeError(f"rate is {self.rate}, expected a number above 0")
        if self.sequences < self.batch:
            raise RecipeError(
                f"batch is {self.batch}, expected at most the {self.sequences} sequences there are"
            )

    @property
    def learning_rate(self) -> float:
        return self.rate or RATES[self.train]

    @property
    def text(self) -> CalibrationSettings:
        """What it reads: sequences to learn from, to stop by and to report on, in this order."""
        return CalibrationSettings(
            samples=self.sequences, length=self.length, seed=self.seed, held_out=2 * self.held_out
        )

    @property
    def loss(self) -> str | dict[str, float]:
        """As a recipe writes it."""
        named = (name for name, beta in LOSSES.items() if beta == self.beta)
        return next(named, None) or {JSD: self.beta}

    @property
    def writes_itself(self) -> bool:
        """Whether the teacher is to write the text."""
        return self.data.partition(":")[0] == SELF

    def beside(self, folder: Path) -> Training:
        """The same with a relative path of its text taken from `folder`."""
        return self if self.writes_itself else replace(self, data=str(folder / self.data))

    def to_dict(self) -> dict[str, Any]:
        """The stage's meaning; of a file of text its name, wherever it lies."""
        found = {key: value for key, value in asdict(self).items() if key != "beta"}
        data = self.data if self.writes_itself else Path(self.data).name
        return {**found, "data": data, "rate": self.learning_rate, "loss": self.loss}


def parse_training(block: Mapping[str, Any], where: str) -> Training:
    """A stage from its mapping; `RecipeError` names `where` and the key."""
    values = dict(block)
    if "beta" in values:
        raise RecipeError(f"{where}: unknown key 'beta'; did you mean 'loss'?")
    if "loss" in values:
        values["beta"] = parse_loss(values.pop("loss"), where)
    found: Training = build_dataclass(Training, values, where, RecipeError)
    return found


def parse_loss(loss: Any, where: str) -> float:
    """The `beta` of `kl`, `reverse_kl` or `{jsd: beta}`."""
    if isinstance(loss, str) and loss in LOSSES:
        return LOSSES[loss]
    if isinstance(loss, Mapping) and list(loss) == [JSD]:
        beta = loss[JSD]
        if isinstance(beta, int | float) and not isinstance(beta, bool) and 0 < beta < 1:
            return float(beta)
        raise RecipeError(f"{where}: jsd is {beta!r:.80}, expected a number between 0 and 1")
    raise RecipeError(
        f"{where}: loss is {loss!r:.80}, expected {', '.join(LOSSES)} or {{jsd: 0.5}}"
    )
