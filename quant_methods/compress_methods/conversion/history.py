"""What the stages of a chain did to a model, one after another: which tensors of the original are
gone and why, what the others are called now, and each stage's facts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from compress_methods.conversion.chain import Chain
from compress_methods.conversion.checkpoint import Source


@dataclass(frozen=True)
class History:
    """`origins`: original name of every tensor there is now. `dropped`: reasons by original name.
    `stages`: what each stage so far did, as `report.json` holds it."""

    chain: Chain
    original_bytes: int
    original_parameters: int
    origins: dict[str, str]
    dropped: dict[str, str] = field(default_factory=dict)
    stages: tuple[dict[str, Any], ...] = ()

    @classmethod
    def begin(cls, chain: Chain, source: Source) -> History:
        parameters = sum(math.prod(entry.shape) for entry in source.entries.values())
        return cls(chain, source.nbytes, parameters, {name: name for name in source.entries})

    def after(
        self, dropped: Mapping[str, str], renamed: Mapping[str, str], stage: dict[str, Any]
    ) -> History:
        """The history with one more stage, the tensors it dropped and those it renamed."""
        left = {renamed.get(n, n): o for n, o in self.origins.items() if n not in dropped}
        gone = self.dropped | {self.origins[name]: reason for name, reason in dropped.items()}
        return replace(self, origins=left, dropped=gone, stages=(*self.stages, stage))

    def report(self) -> dict[str, Any]:
        """Keys of the last stage's report that are to speak of the whole chain."""
        chain = self.chain
        return {
            "recipe": {"name": chain.name, "sha256": chain.sha256, **chain.to_dict()},
            "bytes_before": self.original_bytes,
            "original_parameters": self.original_parameters,
            "dropped": self.dropped,
            "stages": list(self.stages),
        }
