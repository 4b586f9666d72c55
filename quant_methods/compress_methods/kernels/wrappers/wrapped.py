"""What products with wrapper formats share: the base has the kernel that it would have alone."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from compress_methods.formats import Stored
from compress_methods.kernels.base import Kernel, Operator, Prepared, Want
from compress_methods.kernels.dispatch import kernel, prepare

RANK = 200


def prepared_base(stored: Stored, want: Want) -> Prepared:
    """The matrix inside a wrapper, by the table. Padding is added to the whole, whose parts travel
    as text: none can be a layer's then."""
    return prepare(stored, replace(want, pad=0, host=None if want.pad else want.host))


class OtherInputs(Kernel):
    """A product in which the base is given other inputs, and nothing else is done: the part is the
    base."""

    @abstractmethod
    def inputs(
        self, x: Tensor, tensors: Sequence[Tensor], cols: int, facts: Mapping[str, Any]
    ) -> Tensor:
        """What the base, which has `cols` columns, gets of inputs [..., columns]; `tensors` and
        `facts` are the wrapper's own."""

    def matmul(self, x: Tensor, prepared: Prepared, bias: Tensor | None) -> Tensor:
        (base,) = prepared.parts
        given = self.inputs(x, prepared.tensors, base.cols, prepared.facts)
        return kernel(base.kernel).matmul(given, base, bias)

    def operator(self, prepared: Prepared) -> Operator | None:
        (base,) = prepared.parts
        own = kernel(base.kernel).operator(base)
        if own is None:
            return None
        multiply, settings = own
        count, cols, facts = len(prepared.tensors), base.cols, prepared.facts

        def product(x: Tensor, bias: Tensor | None, *tensors: Tensor) -> Tensor:
            given = self.inputs(x, tensors[:count], cols, facts)
            return multiply(given, bias, *settings, *tensors[count:])

        return Operator(product, ())
