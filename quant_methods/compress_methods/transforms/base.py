"""What a pass is: it goes over a model part by part and changes what it finds.

Embeddings, each block, the head, in order: one part is in memory at a time. A pass says beforehand
what it makes of the model (`plan`), from which every name, shape and byte of the result is known
before any work. Then it visits the parts: it may look at a part's matrices, at the statistics of
their inputs, at the states that go in and at what the original makes of the same text, and it
replaces tensors. A pass that must have seen all parts before it can decide (`looks_ahead`) surveys
them first. It never sees files.

A pass is a frozen dataclass whose fields are its parameters in a recipe
(`{transform: NAME, ...}`). A new one is one file with a class under `@register_transform`, or the
same in another distribution through the entry-point group `vllm_compress.transforms`.
"""

from __future__ import annotations

import dataclasses
from abc import ABC
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from compress_methods.algorithms import Seen, Statistic
from compress_methods.errors import RecipeError
from compress_methods.formats import Format
from compress_methods.model.architecture import architecture_of, prunable_types
from compress_methods.model.slot import Slot
from compress_methods.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor, nn

    from compress_methods.model.skeleton import Skeleton


@dataclass(frozen=True)
class Outline:
    """What a pass makes of a model. `changes`: keys of config.json, layers apart. `layers`: how
    many stay. `experts`: how many of a layer stay. `aliases`: modules that are stored as another
    one is, by its name."""

    changes: Mapping[str, Any] = field(default_factory=dict)
    layers: int | None = None
    experts: int | None = None
    aliases: Mapping[str, str] = field(default_factory=dict)


class Part(Protocol):
    """Embeddings (`index` None), a block, or the head (`index` -1), in memory.

    `module`: the block; its weights are float32, or the model's
    own dtype where asked, and it computes what the result will once the passes are done. States
    [sequences, length, hidden] are those of the calibration text.
    """

    index: int | None

    @property
    def prefix(self) -> str:
        """Module name of the block, or of the head."""

    @property
    def batch(self) -> int:
        """Sequences that `forward` takes at once."""

    @property
    def slots(self) -> Sequence[Slot]:
        """Its compressible matrices."""

    @property
    def module(self) -> nn.Module: ...

    @property
    def skeleton(self) -> Skeleton:
        """The model that the part belongs to."""

    @property
    def config(self) -> Any:
        """transformers' config of the model."""

    def packing(self, slot: Slot) -> Format | None:
        """The format that the sweep packs a matrix in; None where it is kept."""

    def weight(self, slot: Slot) -> Tensor:
        """A matrix [rows, cols] as it now is: a view, so writing to it changes the module."""

    def original(self, slot: Slot) -> Tensor:
        """A copy of a matrix, of any part, in float32 as it was before it was packed."""

    def tensor(self, name: str) -> Tensor:
        """A parameter of the part by its name in the model, such as a norm's."""

    def replace(self, name: str, tensor: Tensor) -> None:
        """Have a parameter stored (and, where the shape is the same, computed with) so."""

    def rounded(self, name: str, tensor: Tensor) -> Tensor:
        """A new value of a parameter as the result will hold it: in the dtype it is kept in, or as
        it is where it is packed."""

    def note(self, module: str, line: str) -> None:
        """Say in the report, and to the user, what of a module had to be left and why."""

    def statistics(self, needs: Mapping[str, tuple[type[Statistic], ...]]) -> Mapping[str, Seen]:
        """Statistics of the inputs of some modules as the part now is, by module, of those that
        ran."""

    def inputs(self) -> Tensor:
        """States that go into the part, after everything before it was changed."""

    def forward(self, states: Tensor) -> Tensor:
        """The part applied to some states, differentiable."""

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Move the states through the part as it is; each batch before and after."""

    def teacher(self) -> Tensor:
        """States that the original's part gives for the same text."""


@dataclass(frozen=True)
class Pass(ABC):
    """A change of a model."""

    name: ClassVar[str]
    reshapes: ClassVar[bool] = False
    """Whether shapes, layers or the states between blocks change: the sweep ends with this pass,
    and others get the result."""
    turns: ClassVar[bool] = False
    """Whether states between blocks change their basis, see `turned`: embedding and head become
    different matrices, stored apart, and no pass can come before it in its sweep."""
    looks_ahead: ClassVar[bool] = False
    remakes: ClassVar[bool] = False
    """Whether nothing of what the model knows stays: training has to follow, and no text runs
    through it before."""
    needs_text: ClassVar[bool] = True
    """Whether states run through the model: without, it sees weights alone."""
    needs_teacher: ClassVar[bool] = False
    """Whether `Part.teacher` is asked for: the original then runs beside the result."""

    def plan(self, skeleton: Skeleton) -> Outline:
        """What becomes of the model; raises `RecipeError` where it cannot be changed so."""
        return Outline()

    def check_sweep(self, packs: bool) -> None:  # noqa: B027
        """Raise `RecipeError` where it has nothing to do; `packs`: whether matrices are packed in
        the sweep that visits the parts."""

    def survey(self, part: Part) -> list[float]:
        """What `decide` wants to know of a block; only where the pass looks ahead."""
        raise NotImplementedError

    def decide(self, surveyed: Sequence[Sequence[float]]) -> Pass:
        """The pass with its decision made, from what `survey` said of each block."""
        return self

    def layers(self, count: int) -> list[int]:
        """Indices of the layers that stay of `count`, in order."""
        return list(range(count))

    def owners(self, count: int) -> list[int]:
        """The layer, of `count`, as whose the matrices of each are stored; not after it."""
        return list(range(count))

    def visit(self, part: Part) -> None:  # noqa: B027
        """Change a part."""

    def turned(self, states: Tensor) -> Tensor:
        """States between blocks [..., hidden] of the model that goes in, as they are in the one
        that comes out."""
        return states

    def facts(self) -> dict[str, Any]:
        """What the report says of the pass besides its settings."""
        return {}


def settings(owner: Any) -> dict[str, Any]:
    """The parameters of a pass, as a recipe gives them."""
    return {f.name: getattr(owner, f.name) for f in dataclasses.fields(owner) if f.init}


TRANSFORMS: Registry[type[Pass]] = Registry("transform", "vllm_compress.transforms")
register_transform = TRANSFORMS.register


def check_prunable(config: Any, transform: str) -> None:
    """`RecipeError` unless the result is known to load in transformers and vLLM."""
    if not architecture_of(config).prunable:
        raise RecipeError(
            f"{transform}: models of type {config.model_type!r} cannot be pruned, "
            f"only {', '.join(prunable_types())}"
        )
