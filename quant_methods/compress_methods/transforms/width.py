"""width: narrow every layer alike, by feed-forward channels and by groups of attention heads.

A channel is a row of gate_proj and up_proj and a column of down_proj; a group is a KV head with the
query heads that share it: rows of q, k and v and columns of o_proj. `columns.py` says which go and
what down_proj and o_proj become, from the inputs they see on the calibration text; the rest is cut.
Attention first, so that the feed-forward part sees what is left of it. Channels by their share in
the layer's output as in FLAP (An et al., 2024, arXiv:2312.11983) and Minitron (Muralidharan et al.,
2024, arXiv:2407.14679); their bias or distillation is least squares here, which needs neither.

Never more than asked: kept channels are rounded up to `multiple`, kept groups up to a number that
tensor parallelism up to `tensor_parallel` can share (where the original's can be) and that loads:
Llama wants hidden_size to be a multiple of the heads, Qwen2 in vLLM derives the head size from
their number, so its heads stay.

The width is the same in all layers. vLLM has one Llama-like class with widths of their own per
layer, `DeciLMForCausalLM`; its config is Python code in the checkpoint (--trust-remote-code), which
transformers has no model for, so the result would be neither plain nor checkable.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from compress_methods.algorithms import Hessian
from compress_methods.checkpoint.sharding import shares_heads
from compress_methods.errors import RecipeError
from compress_methods.transforms.base import (
    Outline,
    Part,
    Pass,
    check_prunable,
    register_transform,
)
from compress_methods.transforms.columns import drop_units

if TYPE_CHECKING:
    from torch import Tensor

    from compress_methods.model.skeleton import Skeleton

ATTENTION, MLP = "self_attn", "mlp"
PARALLEL = (2, 4, 8, 16)


@register_transform
@dataclass(frozen=True)
class Width(Pass):
    """`ffn`, `attention`: share of the channels and of the KV groups to drop."""

    ffn: float = 0.25
    attention: float = 0.0
    multiple: int = 128
    tensor_parallel: int = 8
    compensate: bool = True
    name: ClassVar[str] = "width"
    reshapes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for key in ("ffn", "attention"):
            if not 0 <= getattr(self, key) < 1:
                raise RecipeError(f"{key} is {getattr(self, key)}, expected a share from 0 below 1")
        for key in ("multiple", "tensor_parallel"):
            if getattr(self, key) < 1:
                raise RecipeError(f"{key} is {getattr(self, key)}, expected an integer from 1")

    def plan(self, skeleton: Skeleton) -> Outline:
        return Outline(self.changes(skeleton.model.config))

    def changes(self, config: Any) -> dict[str, Any]:
        """Keys of config.json that change, given transformers' config of the model."""
        check_prunable(config, self.name)
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        if heads % groups:
            raise RecipeError(
                f"width: {heads} attention heads are no multiple of {groups} KV heads"
            )
        changed: dict[str, Any] = {}
        channels, left = self._channels(config), self._groups(config)
        if channels < config.intermediate_size:
            changed["intermediate_size"] = channels
        if left < groups:
            changed["num_attention_heads"] = left * (heads // groups)
            changed["num_key_value_heads"] = left
            changed["head_dim"] = head_size(config)
        if (self.ffn or self.attention) and not changed:
            raise RecipeError(
                f"width: nothing would be dropped of {config.intermediate_size} channels in steps "
                f"of {self.multiple} and {groups} KV heads; ask for more, or lower multiple "
                "and tensor_parallel"
            )
        return changed

    def _channels(self, config: Any) -> int:
        size: int = config.intermediate_size
        return min(size, self.multiple * at_least(size * (1 - self.ffn) / self.multiple))

    def _groups(self, config: Any) -> int:
        groups: int = config.num_key_value_heads
        least = at_least(groups * (1 - self.attention))
        return next(n for n in range(least, groups + 1) if n == groups or self._loads(config, n))

    def _loads(self, config: Any, groups: int) -> bool:
        """Whether the model loads with so many KV groups, in vLLM over as many ranks as before."""
        per_group = config.num_attention_heads // config.num_key_value_heads
        if config.model_type == "qwen2":
            return False
        if config.model_type == "llama" and config.hidden_size % (groups * per_group):
            return False
        return all(
            shares_heads(groups * per_group, groups, ways)
            for ways in PARALLEL
            if ways <= self.tensor_parallel
            and shares_heads(config.num_attention_heads, config.num_key_value_heads, ways)
        )

    def visit(self, part: Part) -> None:
        """New values of the block's tensors; in memory it keeps its shapes, with zeros where
        something was dropped."""
        if part.index is None or part.index < 0:
            return
        groups = self._groups(part.config)
        if groups < part.config.num_key_value_heads:
            self._edit_attention(part, groups)
        channels = self._channels(part.config)
        if channels < part.config.intermediate_size:
            columns = self._drop(part, f"{MLP}.down_proj", 1, channels)
            for name in ("gate_proj", "up_proj"):
                _keep_rows(part, f"{MLP}.{name}", columns)

    def _edit_attention(self, part: Part, groups: int) -> None:
        config = part.config
        size = head_size(config)
        unit = size * (config.num_attention_heads // config.num_key_value_heads)
        columns = self._drop(part, f"{ATTENTION}.o_proj", unit, groups)
        kept = columns[::unit] // unit
        _keep_rows(part, f"{ATTENTION}.q_proj", columns)
        rows = (kept[:, None] * size + kept.new_tensor(range(size))).flatten()
        for name in ("k_proj", "v_proj"):
            _keep_rows(part, f"{ATTENTION}.{name}", rows)

    def _drop(self, part: Part, name: str, unit: int, kept: int) -> Tensor:
        """Columns of a layer that stay; in memory it gets zeros elsewhere."""
        slot = next(slot for slot in part.slots if slot.module.endswith(f".{name}"))
        seen = part.statistics({slot.module: (Hessian,)})[slot.module]
        weight = part.weight(slot)
        columns, values = drop_units(weight, Hessian.of(seen), unit, kept, self.compensate)
        part.replace(slot.parameter, values)
        weight.zero_()
        weight[:, columns] = values
        return columns


def at_least(number: float) -> int:
    """The next whole number, 1 at the least; rounding errors of a product do not count."""
    return max(1, math.ceil(number - 1e-9))


def head_size(config: Any) -> int:
    """Columns of one attention head."""
    size = getattr(config, "head_dim", None)
    return int(size or config.hidden_size // config.num_attention_heads)


def _keep_rows(part: Part, name: str, rows: Tensor) -> None:
    """Keep some outputs of a linear layer: rows of its weight, and of its bias if it has one."""
    slot = next(slot for slot in part.slots if slot.module.endswith(f".{name}"))
    for key, value in part.module.get_submodule(name).named_parameters():
        part.replace(f"{slot.module}.{key}", value.data[rows])
