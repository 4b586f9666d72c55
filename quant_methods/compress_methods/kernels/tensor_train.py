"""Trains of cores: rows are made of the cores that they are the product of, when they are asked
for.

A look-up multiplies the cores of its ids alone. A product, of an output head, makes the rows a slab
at a time and multiplies with these as the reference does; of a table the beginnings that rows share
are multiplied once. Torch on every device; slow beside a table that lies unpacked, for the bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from torch import Tensor

from compress_methods.formats import Stored
from compress_methods.formats.tensor_train import ROWS, TensorTrain, table_slabs
from compress_methods.kernels.base import Prepared, Want, check_ids, register_kernel
from compress_methods.kernels.reference import Reference, stored_of

RANK = 200


@register_kernel
class TensorTrainProduct(Reference):
    """Keeps the cores as they are stored."""

    name: ClassVar[str] = "tensor_train"

    def rank(self, stored: Stored, want: Want) -> int | None:
        return RANK if isinstance(stored.format, TensorTrain) else None

    def slabs(self, stored: Stored) -> Iterator[Tensor]:
        fmt = stored.format
        assert isinstance(fmt, TensorTrain)
        if fmt.kind == ROWS:
            yield from super().slabs(stored)
            return
        for rows in table_slabs(fmt.solution(stored.tensors), *stored.rows):
            yield rows[:, slice(*stored.cols)]

    def embed(self, ids: Tensor, prepared: Prepared) -> Tensor:
        check_ids(ids, prepared.rows)
        stored = stored_of(prepared)
        fmt = stored.format
        assert isinstance(fmt, TensorTrain)
        at = ids if stored.cuts_rows else ids + stored.rows[0]
        return fmt.lookup(fmt.solution(stored.tensors), at)[:, slice(*stored.cols)]
