"""`train`: stages of a recipe that win back what compression lost, by gradients.

    - {train: scales, loss: kl, steps: 500, rate: 0.005, data: self}
    - {train: distill, loss: {jsd: 0.5}, on_policy: 0.5, steps: 300}
    - {train: sft, data: answers.jsonl, sequences: 2000}

`train` is `scales`, `distill`, `sft` or `qat`, as `compress_methods.training` describes them.
`loss` is `kl`, `reverse_kl` or `{jsd: 0.5}` to the teacher's predictions; or `ce`, of the tokens
there are, which is that of `sft` unless given, or `topk_kl`, to the predictions that the file has.
`data` is `self` (the teacher writes it; `self:code` and the like under prompts of that kind) or a
file of text; with `ce` and `topk_kl` also one of questions with answers, of which the answers are
learnt. Of `sequences` of `length` tokens the student learns, `batch` at a time; `held_out` others
decide when to stop, and as many again are reported on. `rate` 0 is the method's own. In the share
`on_policy` of the steps the student learns from what it writes itself; with `teacher_mix` each
token of that is, in this share, drawn by the teacher. `lora` above 0 is the rank of adapters that
`distill` or `sft` trains instead of the weights. `match: {hidden: 1.0, attention: 0.5}` adds how
far inner states are from the teacher's, so weighted. `top_k` above 0: the teacher writes that many
tokens that it finds likeliest at each place down first, and is not in memory afterwards.
`gradient_checkpointing: true` computes blocks twice rather than keep what is inside them. `shard:
true` divides what is trained among the processes that torchrun has started.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from compress_methods.calibration.settings import SELF, CalibrationSettings
from compress_methods.errors import RecipeError, nearest
from compress_methods.registry import build_dataclass

TRAIN = "train"
SCALES, DISTILL, SFT, QAT = "scales", "distill", "sft", "qat"
RATES = MappingProxyType({SCALES: 0.005, DISTILL: 0.005, SFT: 0.005, QAT: 0.002})
"""Of Adam, by method; a parameter's own size is 1."""
KL, REVERSE_KL, JSD = "kl", "reverse_kl", "jsd"
BETAS = MappingProxyType({KL: 0.0, REVERSE_KL: 1.0})
"""The `beta` of `training/objectives/losses.py` that each is."""
CE, TOPK_KL = BY_TOKEN = ("ce", "topk_kl")
HIDDEN, ATTENTION = MATCHED = ("hidden", "attention")
LEAST = MappingProxyType(
    {
        "steps": 1,
        "batch": 1,
        "sequences": 1,
        "held_out": 1,
        "length": 8,
        "seed": 0,
        "lora": 0,
        "top_k": 0,
    }
)


@dataclass(frozen=True)
class Training:
    """One validated `train` stage."""

    train: str
    loss: str | Mapping[str, float] = ""
    steps: int = 500
    rate: float = 0.0
    data: str = SELF
    batch: int = 8
    sequences: int = 512
    held_out: int = 16
    length: int = 256
    seed: int = 1
    on_policy: float = 0.0
    teacher_mix: float = 0.0
    lora: int = 0
    match: Mapping[str, float] = field(default_factory=dict)
    top_k: int = 0
    gradient_checkpointing: bool = False
    shard: bool = False

    def __post_init__(self) -> None:
        if self.train not in RATES:
            raise RecipeError(f"unknown train {self.train!r:.80}; {nearest(self.train, RATES)}")
        if not self.loss:
            object.__setattr__(self, "loss", CE if self.train == SFT else KL)
        _require_loss(self.loss)
        if self.train == SFT and not self.by_token:
            raise RecipeError(f"loss is {self.loss!r}, expected {' or '.join(BY_TOKEN)} of sft")
        for key, least in LEAST.items():
            if getattr(self, key) < least:
                raise RecipeError(f"{key} is {getattr(self, key)}, expected {least} or more")
        if not (math.isfinite(self.rate) and self.rate >= 0):
            raise RecipeError(f"rate is {self.rate}, expected a number above 0")
        if self.sequences < self.batch:
            raise RecipeError(
                f"batch is {self.batch}, expected at most the {self.sequences} sequences there are"
            )
        if self.lora and self.train not in (DISTILL, SFT):
            raise RecipeError(f"lora is for {DISTILL} and {SFT}, not for {self.train}")
        self._require_shares()

    def _require_shares(self) -> None:
        """`RecipeError` where the text of the student's own is not one that can be written."""
        if not 0 <= self.on_policy <= 1:
            raise RecipeError(f"on_policy is {self.on_policy}, expected a share from 0 to 1")
        if not 0 <= self.teacher_mix < 1:
            raise RecipeError(f"teacher_mix is {self.teacher_mix}, expected a share below 1")
        if self.teacher_mix and not (self.on_policy and self.loss == REVERSE_KL):
            raise RecipeError("teacher_mix needs `loss: reverse_kl` and on_policy above 0")
        for key in ("on_policy", "match"):
            if getattr(self, key) and self.by_token:
                raise RecipeError(f"{key} needs a loss of {', '.join(BETAS)} or {{jsd: 0.5}}")
        if self.top_k and (self.loss != KL or self.on_policy or self.match):
            raise RecipeError("top_k needs `loss: kl`, without on_policy and match")
        whole = {
            f"train: {QAT}": self.train == QAT,
            "on_policy": self.on_policy,
            "match": self.match,
        }
        for what, is_asked in whole.items():
            if self.shard and is_asked:
                raise RecipeError(f"shard and {what} do not go together; leave one of them out")
        for name, weight in self.match.items():
            if name not in MATCHED:
                raise RecipeError(f"match: unknown {name!r:.80}; {nearest(str(name), MATCHED)}")
            if not _is_number(weight) or not 0 < weight < math.inf:
                raise RecipeError(f"match: {name} is {weight!r:.80}, expected a number above 0")

    @property
    def learning_rate(self) -> float:
        return self.rate or RATES[self.train]

    @property
    def by_token(self) -> bool:
        """Whether the loss is not one to the teacher's own predictions."""
        return self.loss in BY_TOKEN

    @property
    def beta(self) -> float:
        """That of the generalised Jensen-Shannon divergence that the loss is."""
        return BETAS[self.loss] if isinstance(self.loss, str) else float(self.loss[JSD])

    @property
    def text(self) -> CalibrationSettings:
        """What it reads: sequences to learn from, to stop by and to report on, in this order."""
        return CalibrationSettings(
            samples=self.sequences, length=self.length, seed=self.seed, held_out=2 * self.held_out
        )

    @property
    def writes_itself(self) -> bool:
        """Whether the teacher is to write the text."""
        return self.data.partition(":")[0] == SELF

    def beside(self, folder: Path) -> Training:
        """The same with a relative path of its text taken from `folder`."""
        return self if self.writes_itself else replace(self, data=str(folder / self.data))

    def to_dict(self) -> dict[str, Any]:
        """The stage's meaning; of a file of text its name, wherever it lies."""
        data = self.data if self.writes_itself else Path(self.data).name
        return {**asdict(self), "data": data, "rate": self.learning_rate}


def parse_training(block: Mapping[str, Any], where: str) -> Training:
    """A stage from its mapping; `RecipeError` names `where` and the key."""
    found: Training = build_dataclass(Training, block, where, RecipeError)
    return found


def _require_loss(loss: Any) -> None:
    """`RecipeError` where it is none."""
    if isinstance(loss, str) and loss in (*BETAS, *BY_TOKEN):
        return
    if not (isinstance(loss, Mapping) and list(loss) == [JSD]):
        named = ", ".join((*BETAS, *BY_TOKEN))
        raise RecipeError(f"loss is {loss!r:.80}, expected {named} or {{jsd: 0.5}}")
    beta = loss[JSD]
    if not _is_number(beta) or not 0 < beta < 1:
        raise RecipeError(f"jsd is {beta!r:.80}, expected a number between 0 and 1")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
