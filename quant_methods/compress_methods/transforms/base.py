"""What a transform is: a model goes in, a plain smaller model comes out, its config changed to fit.

A transform is a frozen dataclass whose fields are its parameters in a recipe. It says how config
and number of layers change, from which every shape and so every byte of the result is known before
any work. Then, while blocks pass through memory one at a time, it may score each by what goes in
and comes out (`scores_blocks`) and choose the layers to keep, and may edit what each block holds
(`edits_blocks`). It never sees files, names of other blocks or the way they are run.

A new transform is one file with a class under `@register_transform`, or the same in another
distribution through the entry-point group `vllm_compress.transforms`.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from compress_methods.algorithms.base import Hessian
from compress_methods.errors import RecipeError
from compress_methods.registry import Registry

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class Block:
    """A decoder block in memory: `module` in float32, which also moves the activations on, and the
    model's `config`. `hessian(name)` runs the calibration through the block as it is at that moment
    and gives mean x x^T of the input of one of its linear layers."""

    module: nn.Module
    config: Any
    hessian: Callable[[str], Hessian]


@dataclass(frozen=True)
class Transform(ABC):
    """An edit of a model."""

    name: ClassVar[str]
    scores_blocks: ClassVar[bool] = False
    edits_blocks: ClassVar[bool] = False

    def layers_left(self, count: int) -> int:
        """How many of `count` layers stay; raises `RecipeError` where that cannot be."""
        return count

    def changes(self, config: Any) -> dict[str, Any]:
        """Keys of config.json that change, layers apart, given transformers' config of the model;
        raises `RecipeError` where this model cannot be changed so."""
        return {}

    def score(self, before: Tensor, after: Tensor) -> float:
        """How much a block matters, of its input and output [sequences, length, hidden]."""
        raise NotImplementedError

    def choose(self, scores: Sequence[float]) -> list[int]:
        """Indices of the layers that stay, in order, from the mean score of each."""
        return list(range(len(scores)))

    def edit(self, block: Block) -> dict[str, Tensor]:
        """New values of the block's tensors, those that change, by their names inside the block.

        Leaves `block.module` computing what the result will, in its old shapes if need be.
        """
        return {}


TRANSFORMS: Registry[type[Transform]] = Registry("transform", "vllm_compress.transforms")
register_transform = TRANSFORMS.register


def check_family(config: Any, transform: str) -> None:
    """`RecipeError` unless the result is known to load in transformers and vLLM."""
    if config.model_type not in FAMILIES:
        raise RecipeError(
            f"{transform}: models of type {config.model_type!r} cannot be pruned, "
            f"only {', '.join(FAMILIES)}"
        )
