"""tensor_train: token vectors, or a whole table of them, as a product of small cores.

A vector of d_1 d_2 ... d_N values is folded to a tensor with N axes, whose entries are products

    v[j_1, ..., j_N] = G_1[j_1] G_2[j_2] ... G_N[j_N]

of matrices G_k[j_k] [r_(k-1), r_k], r_0 = r_N = 1 (Oseledets, 2011, doi:10.1137/090752286). Of two
kinds:

  rows    every row has cores of its own (TensorGPT, Xu et al., 2023, arXiv:2307.00526): `columns`
          are folded. Rows of tensor-parallel ranks are cut; each rank holds its own
  table   the whole matrix is one train, rows and columns folded alike: G_k[i_k, j_k] is a matrix
          (TT embeddings, Hrinchuk et al., 2019, arXiv:1901.10787). Every rank holds all cores

Both are filled by TT-SVD: one unfolding after another is cut down to its r_k leading directions;
what follows is refitted to these as they are rounded. The rank is given, r_k is never more than
what lies on either side of it, so bytes are known beforehand; ranks chosen by an error are not.
Rows are looked up, and a tied head multiplies, from the cores: see `kernels/tensor_train.py`.

Stored, for a [rows, cols] matrix, in `dtype`, k from 2 to `modes`:

  weight_packed, weight_core_k   [rows, r_(k-1), d_k, r_k]; of a table [r_(k-1), n_k, d_k, r_k]

Sizes are cut into factors that are as even as their divisors allow, without padding.

Fails where: a table trained without it has no such structure, so most of it is cut off. Measured on
novels-8m with its [4096, 256] token table alone in the format, KL in nats per token of 10,000:

  rows, 2 axes, rank 1, 2, 4      2.0, 4.0, 8.0 bits    1.67, .583, .133
  rows, 4 axes, rank 2, 4         3.0, 10 bits          1.27, .133
  rows, 8 axes, rank 2            3.5 bits              1.90
  table, 2 axes, rank 64, 128     2.0, 4.0 bits         2.95, 1.64
  table, 3 axes, rank 32, 64      2.1, 8.2 bits         2.94, .918
  integer, g128, rtn              2.1, 3.1, 4.1 bits    .042, .0081, .0017

So integers of 2 bits lose less than any of these. GPTQ in the blocks behind makes up for half: the
recipe loses .062, with its table in int4 .005 in fewer bytes. A size with a large prime factor
folds badly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from compress_methods.errors import FormatError
from compress_methods.formats.base import (
    MAIN_TENSOR,
    Axis,
    Format,
    TensorSpec,
    register_format,
    torch_dtype,
)
from compress_methods.formats.dense import DTYPES
from compress_methods.formats.fitting.principal import principal
from compress_methods.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

Cores = Sequence["Tensor"]
ROWS, TABLE = "rows", "table"
MOST_MODES = 8
SLAB_ELEMENTS = 2**22


@register_format
@dataclass(frozen=True)
class TensorTrain(Format):
    """`rank`: the most that any r_k is; `kind`: rows or table; `modes`: N, how many axes there
    are; `dtype` of the cores: bfloat16, float16 or float32."""

    rank: int
    kind: str = ROWS
    modes: int = 3
    dtype: str = "bfloat16"
    name: ClassVar[str] = "tensor_train"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise FormatError(f"rank is {self.rank}, expected at least 1")
        if self.kind not in (ROWS, TABLE):
            raise FormatError(f"kind is {self.kind!r}, expected {ROWS} or {TABLE}")
        if not 2 <= self.modes <= MOST_MODES:
            raise FormatError(f"modes is {self.modes}, expected 2 to {MOST_MODES}")
        if self.dtype not in DTYPES:
            raise FormatError(f"dtype is {self.dtype!r}, expected one of {', '.join(DTYPES)}")

    def tensors(self, rows: int, cols: int) -> dict[str, TensorSpec]:
        widths, heights = fold(cols, self.modes), [1] * self.modes
        if self.kind == TABLE:
            heights = fold(rows, self.modes)
        ranks = self._ranks([n * d for n, d in zip(heights, widths, strict=True)])
        axis = Axis(0) if self.kind == ROWS else None
        out = {}
        for k, name in enumerate(self._names()):
            before, after = ranks[k], ranks[k + 1]
            shape = (rows, before, widths[k], after)
            if self.kind == TABLE:
                shape = (before, heights[k], widths[k], after)
            out[name] = TensorSpec(shape, self.dtype, axis)
        return out

    def _names(self) -> list[str]:
        return [MAIN_TENSOR, *(f"weight_core_{k}" for k in range(2, self.modes + 1))]

    def _ranks(self, sizes: Sequence[int]) -> list[int]:
        """r_0 to r_N of a train with axes of these sizes."""
        sides = ((math.prod(sizes[:k]), math.prod(sizes[k:])) for k in range(len(sizes) + 1))
        return [min(self.rank, *side) for side in sides]

    def pack(self, solution: Cores) -> dict[str, Tensor]:
        out = {}
        for name, core in zip(self._names(), solution, strict=True):
            out[name] = core.to(torch_dtype(self.dtype)).contiguous()
            if not out[name].isfinite().all():
                raise FormatError(f"a value does not fit {self.dtype}; use dtype: bfloat16")
        return out

    def solution(self, tensors: Mapping[str, Tensor]) -> Cores:
        return [tensors[name] for name in self._names()]

    def matrix(self, solution: Cores) -> Tensor:
        if self.kind == TABLE:
            rows = math.prod(core.shape[1] for core in solution)
            return torch.cat(list(table_slabs(solution, 0, rows)))
        return self.lookup(solution, torch.arange(len(solution[0]), device=solution[0].device))

    def lookup(self, solution: Cores, ids: Tensor) -> Tensor:
        """Rows `ids` [n] -> [n, cols] float32, a slab of them at a time."""
        cols = math.prod(core.shape[2] for core in solution)
        pieces = ids.split(max(1, SLAB_ELEMENTS // (cols * self.rank)))
        return torch.cat([expand(self._cores_of(solution, piece)) for piece in pieces])

    def _cores_of(self, solution: Cores, ids: Tensor) -> Cores:
        """The cores [n, r_(k-1), d_k, r_k] that rows `ids` are the products of."""
        if self.kind == ROWS:
            return [core[ids] for core in solution]
        below = math.prod(core.shape[1] for core in solution)
        out = []
        for core in solution:
            below //= core.shape[1]
            out.append(core[:, ids // below % core.shape[1]].transpose(0, 1))
        return out

    def nearest(
        self, weight: Tensor, importance: Tensor | None = None, mask: Tensor | None = None
    ) -> Cores:
        """TT-SVD: the best cores of rank r for each unfolding in turn. All values count alike."""
        rows, cols = weight.shape
        specs = self.tensors(rows, cols).values()
        if self.kind == ROWS:
            return self._train(weight.float(), [spec.shape[1:] for spec in specs])
        # Axis k of the train is that of the rows beside that of the columns.
        both = weight.float().reshape(*fold(rows, self.modes), *fold(cols, self.modes))
        order = [axis for k in range(self.modes) for axis in (k, self.modes + k)]
        sizes = [(s.shape[0], s.shape[1] * s.shape[2], s.shape[3]) for s in specs]
        found = self._train(both.permute(order).reshape(1, -1), sizes)
        return [core.reshape(spec.shape) for core, spec in zip(found, specs, strict=True)]

    def _train(self, rest: Tensor, sizes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """Cores [n, r_(k-1), s_k, r_k] of n tensors, whose values `rest` [n, s_1 ... s_N] holds;
        `sizes` says the three others. Rounded."""
        count, cores = len(rest), []
        for before, size, after in sizes[:-1]:
            rest = rest.reshape(count, before * size, -1)
            left = self._rounded(_leading(rest, after))
            # As rounding has left it, it is not quite orthonormal.
            square, seen = left.mT @ left, left.mT @ rest
            rest = torch.linalg.solve(square, seen)
            cores.append(left.reshape(count, before, size, after))
        return [*cores, self._rounded(rest.reshape(count, *sizes[-1]))]

    def _rounded(self, values: Tensor) -> Tensor:
        return values.to(torch_dtype(self.dtype)).float()

    @property
    def cut_by(self) -> str:
        return "modes"

    def describe(self) -> str:
        width = "" if self.dtype == "bfloat16" else f" {self.dtype}"
        return f"train of {self.kind} {self.modes}d rank {self.rank}{width}"


def fold(size: int, modes: int) -> list[int]:
    """`size` as a product of so many factors: each the divisor of what is left that is nearest to
    an even share of it."""
    factors = []
    for left in range(modes, 1, -1):
        even = math.log(size) / left
        divisors = (n for n in range(1, math.isqrt(size) + 1) if size % n == 0)
        both = sorted({n for small in divisors for n in (small, size // small)})
        factors.append(min(both, key=lambda n: abs(math.log(n) - even)))
        size //= factors[-1]
    return [*factors, size]


def expand(cores: Cores) -> Tensor:
    """[n, cols] float32 of n trains of cores [n, r_(k-1), d_k, r_k]. Summed in float64, so that a
    piece has the bits that the whole has."""
    found = cores[0].double()[:, 0]
    for core in cores[1:]:
        found = torch.bmm(found, core.double().flatten(2))
        found = found.reshape(len(core), -1, core.shape[3])
    return found.flatten(1).float()


def table_slabs(cores: Cores, first: int, last: int) -> Iterator[Tensor]:
    """Rows `first` to `last` (not included) of a table, [n, cols] float32, some at a time: those
    that have the same highest digits i_1 in their numbers, whose beginnings they share."""
    each = math.prod(core.shape[1] for core in cores[1:])
    cols = math.prod(core.shape[2] for core in cores)
    step, end = max(1, SLAB_ELEMENTS // (each * cols)), -(-last // each)
    for digit in range(first // each, end, step):
        found = cores[0][0, digit : min(digit + step, end)].double()
        for core in cores[1:]:
            found = torch.tensordot(found, core.double(), 1).transpose(1, 2)
            found = found.flatten(2, 3).flatten(0, 1)
        yield found[max(0, first - digit * each) : last - digit * each, :, 0].float()


def _leading(matrices: Tensor, rank: int) -> Tensor:
    """The first left singular vectors [n, rows, rank] of matrices [n, rows, cols]."""
    if len(matrices) == 1:
        return principal(matrices[0], rank)[None]
    found: Tensor = torch.linalg.svd(matrices, full_matrices=False).U[..., :rank]
    return found
