"""A compressible matrix is a view of a parameter.

Most parameters are one matrix; GPT-2's lie transposed, and a fused expert
`experts.gate_up_proj[e, :I]` is one among many in its parameter. Nothing else needs to know.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

Index = tuple["int | tuple[int, ...]", ...]


@dataclass(frozen=True)
class Slot:
    """[rows, cols] = [outputs, inputs] of a parameter; tokens first for embeddings.

    `module` is what recipes, stored tensors and vLLM call the matrix. `kind` is `blocks`,
    `experts`, `embedding`, `lm_head` or empty, what a recipe's `match` may say. `index` takes one
    entry or a range [start, end), with a step if not 1, of each of the parameter's first axes;
    `transposed`: what is left lies [cols, rows].
    """

    module: str
    parameter: str
    kind: str
    rows: int
    cols: int
    transposed: bool = False
    index: Index = ()

    @property
    def is_plain(self) -> bool:
        """Whether the parameter is the matrix, row by row."""
        return not (self.transposed or self.index)

    @property
    def alone(self) -> Slot:
        """The same in its parameter's one entry that holds it."""
        return replace(self, index=(0, *self.index[1:]))

    def of(self, parameter: Tensor) -> Tensor:
        """The view [rows, cols] of its parameter."""
        at = tuple(slice(*i) if isinstance(i, tuple) else i for i in self.index)
        view = parameter[at] if at else parameter
        return view.T if self.transposed else view

    def view(self, model: Any) -> Tensor:
        """The view [rows, cols] of its parameter in a model."""
        return self.of(model.get_parameter(self.parameter).data)

    def read(self, source: Any) -> Tensor:
        """[rows, cols] as a checkpoint (`checkpoint.Source`) holds it."""
        found: Tensor = source.read_slot(self)
        return found

    def write(self, model: Any, values: Tensor) -> None:
        """Put values [rows, cols] into the model, in the dtype it has."""
        self.view(model).copy_(values)
