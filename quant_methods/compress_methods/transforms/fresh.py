"""fresh: a student of sizes of its own, which knows nothing yet.

Family, vocabulary and head size are those of the model; everything else is as asked. Values are
those that transformers starts such a model from, drawn from the seed. The `train` stage that has to
follow makes a model of it: `distill` towards the original, or `sft` on text alone.

Fails where: training is short. A student that was cut out of its teacher (`depth`, `width`) is far
ahead of one that starts from nothing; this is for sizes that no cut gives.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from compress_methods.errors import RecipeError
from compress_methods.lazy import torch
from compress_methods.transforms.base import (
    Outline,
    Part,
    Pass,
    check_prunable,
    register_transform,
)
from compress_methods.transforms.width import head_size

if TYPE_CHECKING:
    from compress_methods.model.skeleton import Skeleton

MOST = 2**20


@register_transform
@dataclass(frozen=True)
class Fresh(Pass):
    """Sizes, the model's own where 0: `blocks`, `hidden` (width of the states), `ffn` (channels),
    `heads` and `kv_heads` (of queries, of keys). `seed`: of the values."""

    blocks: int = 0
    hidden: int = 0
    ffn: int = 0
    heads: int = 0
    kv_heads: int = 0
    seed: int = 0
    name: ClassVar[str] = "fresh"
    reshapes: ClassVar[bool] = True
    remakes: ClassVar[bool] = True
    needs_text: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for key in ("blocks", "hidden", "ffn", "heads", "kv_heads", "seed"):
            if not 0 <= (found := getattr(self, key)) <= MOST:
                raise RecipeError(f"{key} is {found!r:.40}, expected a number from 0 to {MOST:,}")

    def plan(self, skeleton: Skeleton) -> Outline:
        count = len(skeleton.blocks)
        if self.blocks > count:
            raise RecipeError(f"fresh: blocks is {self.blocks}, expected at most the {count} of it")
        return Outline(self.changes(skeleton.model.config), layers=self.blocks or count)

    def changes(self, config: Any) -> dict[str, Any]:
        """Keys of config.json, given transformers' config of the model."""
        check_prunable(config, self.name)
        size = head_size(config)
        hidden = self.hidden or config.hidden_size
        heads = self.heads or (config.num_attention_heads if not self.hidden else hidden // size)
        share = config.num_attention_heads // config.num_key_value_heads
        groups = self.kv_heads or max(1, heads // share)
        if not heads or hidden % heads or heads % groups:
            raise RecipeError(
                f"fresh: hidden {hidden}, heads {heads} and kv_heads {groups} have to divide each "
                "other in this order"
            )
        return {
            "hidden_size": hidden,
            "intermediate_size": self.ffn or config.intermediate_size,
            "num_attention_heads": heads,
            "num_key_value_heads": groups,
            "head_dim": size,
        }

    def layers(self, count: int) -> list[int]:
        return list(range(self.blocks or count))

    def visit(self, part: Part) -> None:
        """Replace whatever the part holds."""
        skeleton = part.skeleton
        values = dict(self._model(skeleton).named_parameters())
        inside = part.index if part.index is not None and part.index >= 0 else None
        for name in skeleton.parameter_names():
            if skeleton.block_of(name) == inside:
                part.replace(name, values[name])

    def _model(self, skeleton: Skeleton) -> Any:
        """The student, made once."""
        if "_made" not in vars(self):
            config = deepcopy(skeleton.model.config)
            blocks = self.blocks or len(skeleton.blocks)
            changed = {**self.changes(config), "num_hidden_layers": blocks}
            if getattr(config, "layer_types", None):
                changed["layer_types"] = config.layer_types[:blocks]
            for key, value in changed.items():
                setattr(config, key, value)
            with torch.random.fork_rng():
                torch.manual_seed(self.seed)
                object.__setattr__(self, "_made", type(skeleton.model)(config))
        return vars(self)["_made"]
