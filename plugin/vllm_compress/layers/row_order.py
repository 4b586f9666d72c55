"""Moving stored rows as vLLM's model class moves those of the weights it knows.

Falcon's class reorders a fused query-key-value only where the parameter has an `output_dim`;
Llama-4's permutes tensors called `weight_packed` and `weight_scale`, and ours have more. The rest
is done here. `compress_methods.checkpoint.row_order` has refused what cannot be moved.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import Parameter

from compress_methods.formats import MAIN_TENSOR
from compress_methods.model.architecture import ROTARY_HALVES, WHOLE_HEADS

MOVED_BY_VLLM = (MAIN_TENSOR, "weight", "weight_scale")
"""Names of tensors that vLLM's Llama-4 permutes by itself."""


def mark(parameter: Parameter, how: str | None) -> None:
    """Give a parameter what a class looks for before it moves whole heads."""
    if how == WHOLE_HEADS:
        parameter.output_dim = 0  # type: ignore[attr-defined]


def finish(name: str, loaded: Tensor, how: str | None, head: Any) -> Tensor:
    """A loaded tensor with its rows where vLLM's layer expects them; `head` rows make a head."""
    if how != ROTARY_HALVES or name in MOVED_BY_VLLM:
        return loaded
    return loaded.unflatten(0, (-1, head // 2, 2)).transpose(1, 2).reshape(loaded.shape)
