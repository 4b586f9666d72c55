"""Blocks that keep nothing for the way back but their inputs, and compute the rest once more
(gradient checkpointing: Chen et al., 2016, arXiv:1604.06174).

Memory of activations is then that of one block and the states between blocks, and a step takes a
third longer. transformers' own would compute again with the parameters that the model holds, while
a student's exist during a call alone; so a block takes those it is called with along.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class OwnForward(nn.Module):
    """A block by its class's own forward."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args: Any, **given: Any) -> Any:
        return type(self.block).forward(self.block, *args, **given)


def recompute_blocks(blocks: nn.ModuleList) -> None:
    """Have each block computed again where gradients go back through it."""
    for block in blocks:
        block.forward = partial(_forward, OwnForward(block))


def _forward(inner: OwnForward, *args: Any, **given: Any) -> Any:
    if not torch.is_grad_enabled():
        return inner(*args, **given)
    values: dict[str, Tensor] = dict(inner.named_parameters())

    def again(*inputs: Any, **named: Any) -> Any:
        return torch.func.functional_call(inner, values, inputs, named)

    return checkpoint(again, *args, use_reentrant=False, **given)
