"""Integers in groups of columns, as several tools store them: value = scale * (code - zero), or
scale * code + offset.

Which format of ours holds them exactly, if one does, is found from scales, zero points and the
order of columns alone, so that planning reads no weights. Groups that are a multiple of 128 columns
become several with the same scale; zero points that take a bit more than the codes get it;
symmetric codes of 1 or 7 bits are stored in 2 or 8. Columns whose groups lie in another order
(`desc_act`, `actorder`) are format `reordered`; offsets are format `shifted`.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compress_methods.errors import CheckpointError, FormatError
from compress_methods.formats import Format, torch_dtype
from compress_methods.formats.dense import Dense
from compress_methods.formats.encoding.codes import PLANES
from compress_methods.formats.integer import Integer, IntegerSolution
from compress_methods.formats.wrappers.reordered import Reordered, ReorderedSolution
from compress_methods.formats.wrappers.shifted import Shifted, ShiftedSolution
from compress_methods.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

SIZES = (128, 64, 32)
DTYPES = ("bfloat16", "float16", "float32")
DENSE = Dense("float32")


@dataclass(frozen=True)
class Groups:
    """Everything but the codes of a [rows, cols] matrix. `scales` [rows, groups]; `zeros` integers
    [rows, groups], None for 2^(bits - 1); `group_of` [cols], None for equal runs of neighbours;
    `size`: their columns, where the last is shorter than the others; `offsets` [rows, groups],
    in place of zeros, of groups that are equal runs."""

    bits: int
    cols: int
    scales: Tensor
    zeros: Tensor | None = None
    group_of: Tensor | None = None
    activations: str | None = None
    size: int = 0
    offsets: Tensor | None = None

    def __post_init__(self) -> None:
        if self.zeros is not None and self.zeros.shape != self.scales.shape:
            raise ValueError(
                f"zero points {list(self.zeros.shape)}, scales {list(self.scales.shape)}"
            )
        if self.group_of is None and not self.size and self.cols % self.scales.shape[1]:
            raise ValueError(f"{self.scales.shape[1]} groups of {self.cols} columns")

    @property
    def middle(self) -> int:
        return 2 ** (self.bits - 1)

    @property
    def order(self) -> Tensor | None:
        """Columns by their groups, which is how they are stored; None where they lie so."""
        found = self.group_of
        if found is None or bool((found[1:] >= found[:-1]).all()):
            return None
        return found.argsort(stable=True)

    @property
    def is_symmetric(self) -> bool:
        return self.zeros is None or bool((self.zeros == self.middle).all())

    def format(self) -> Format | None:
        """What holds the matrix exactly; None where nothing does."""
        group = self._group_size()
        if group is None or (dtype := exact_dtype(self.scales)) is None:
            return None
        most = 0 if self.is_symmetric or self.zeros is None else int(self.zeros.max())
        needed = max(self.bits, most.bit_length())
        bits = next((b for b in sorted(PLANES) if b >= needed), None)
        if bits is None:
            return None
        with contextlib.suppress(FormatError):
            base = Integer(bits, group, self.is_symmetric, self.activations, dtype)
            base.check_shape(len(self.scales), self.cols)
            if self.offsets is not None:
                added = exact_dtype(self.offsets)
                return None if added is None else Shifted(base, added)
            return base if self.order is None else Reordered(base)
        return None

    def read(self, codes: Tensor) -> tuple[Format, Any]:
        """Format and solution of codes uint8 [rows, cols]; dense values where nothing else holds
        them."""
        if codes.shape != (len(self.scales), self.cols):
            raise ValueError(f"codes {list(codes.shape)}, scales of {len(self.scales)} rows")
        fmt = self.format()
        if fmt is None:
            return DENSE, self.values(codes)
        base = fmt.base if isinstance(fmt, Reordered | Shifted) else fmt
        assert isinstance(base, Integer)
        repeat = base.groups(self.cols) // self.scales.shape[1]
        scales = self.scales.repeat_interleave(repeat, 1)
        if self.offsets is not None:
            added = self.offsets.repeat_interleave(repeat, 1)
            return fmt, ShiftedSolution(IntegerSolution(codes, scales), added)
        zeros = None
        if not base.symmetric:
            assert self.zeros is not None
            zeros = self.zeros.to(torch.uint8).repeat_interleave(repeat, 1)
        if base.symmetric:
            codes = codes + (2 ** (base.bits - 1) - self.middle)
        order = self.order
        if order is None:
            return fmt, IntegerSolution(codes, scales, zeros)
        return fmt, ReorderedSolution(IntegerSolution(codes[:, order], scales, zeros), order)

    def values(self, codes: Tensor) -> Tensor:
        """float32 [rows, cols]."""
        places = self.group_of
        if places is None:
            size = self.size or -(-self.cols // self.scales.shape[1])
            places = torch.arange(self.cols) // size
        if len(places) and (int(places.min()) < 0 or int(places.max()) >= self.scales.shape[1]):
            raise CheckpointError(
                f"columns are in groups {int(places.min())} to {int(places.max())}, but there are "
                f"{self.scales.shape[1]}"
            )
        if self.offsets is not None:
            return codes.float() * self.scales.float()[:, places] + self.offsets.float()[:, places]
        zeros: Any = self.middle if self.zeros is None else self.zeros.float()[:, places]
        return (codes.float() - zeros) * self.scales.float()[:, places]

    def _group_size(self) -> int | None:
        """Of a format of ours: a part of the group of theirs; None where the groups differ in size
        or no such part is there."""
        count = self.scales.shape[1]
        if self.cols % count:
            return None
        size = self.cols // count
        if self.size not in (0, size) and count > 1:
            return None
        if self.group_of is not None:
            sizes = self.group_of.bincount(minlength=count)
            if len(sizes) != count or not bool((sizes == size).all()):
                return None
        if count == 1:
            return -1
        return next((s for s in SIZES if size % s == 0), None)


def exact_dtype(scales: Tensor) -> str | None:
    """The smallest dtype of ours that holds all scales as they are; None for a scale that is not
    finite."""
    if not bool(scales.isfinite().all()):
        return None
    wide = scales.float()
    own = (str(scales.dtype).removeprefix("torch."),)
    for name in (*(n for n in own if n in DTYPES[:2]), *DTYPES):
        if torch.equal(wide.to(torch_dtype(name)).float(), wide):
            return name
    return None
