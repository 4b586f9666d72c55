"""What the stages of a recipe did to a model, one after another: which tensors of the original are
gone and why, what the others are called now, and each stage's facts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from compress_methods.checkpoint.source import Source
from compress_methods.recipe.stages import StagedRecipe


@dataclass(frozen=True)
class History:
    """`origins`: original name of every tensor there is now. `dropped`: reasons by original name.
    `stages`: what each stage so far did, as `report.json` holds it."""

    recipe: StagedRecipe
    original_bytes: int
    original_parameters: int
    origins: dict[str, str]
    dropped: dict[str, str] = field(default_factory=dict)
    stages: tuple[dict[str, Any], ...] = ()

    @classmethod
    def begin(cls, recipe: StagedRecipe, source: Source) -> History:
        parameters = sum(math.prod(entry.shape) for entry in source.held)
        return cls(recipe, source.nbytes, parameters, {name: name for name in source.entries})

    def after(
        self, dropped: Mapping[str, str], renamed: Mapping[str, str], stage: dict[str, Any]
    ) -> History:
        """The history with one more stage, the tensors it dropped and those it renamed."""
        left = {renamed.get(n, n): o for n, o in self.origins.items() if n not in dropped}
        gone = self.dropped | {self.origins[name]: reason for name, reason in dropped.items()}
        return replace(self, origins=left, dropped=gone, stages=(*self.stages, stage))

    def report(self) -> dict[str, Any]:
        """Keys of the last stage's report that are to speak of the whole recipe."""
        recipe = self.recipe
        return {
            "recipe": {"name": recipe.name, "sha256": recipe.sha256, **recipe.to_dict()},
            "bytes_before": self.original_bytes,
            "original_parameters": self.original_parameters,
            "dropped": self.dropped,
            "stages": list(self.stages),
        }
