"""lookup: a table of 2^b values, value = scale * table[code].

b in {2, 3, 4}; a scale belongs to `group_size` consecutive columns of one row, -1 meaning the whole
row, and may be negative. `table` says whose values they are:

  learned  fitted to the weights, one table for `table_rows` rows: 1 (SqueezeLLM, Kim et al., 2023,
           arXiv:2306.07629) or a multiple of 16. `kmeans` fits table and scales in turn
           (`table_search.py`); `gptq` starts there, and its sweeps give the values of least squares
           for the codes there are (LNQ, Kim et al., 2025, arXiv:2505.07004)
  binary   learned, but sums of b scales, each added or subtracted: the binary-coding form of
           LUT-GEMM (Park et al., 2022, arXiv:2206.09557) as a table
  nf4      quantiles of the normal distribution (QLoRA, Dettmers et al., 2023, arXiv:2305.14314)
  fp4      4-bit floats with 2 bits of exponent, 1 of mantissa (E2M1); a code is the float's bits
  iq4      of GGUF's IQ4_NL and IQ4_XS, as llama.cpp has them
  bnb_nf4, bnb_fp4  as bitsandbytes has them, to the last bit of float32

Tables but the last two are of whole numbers up to 127, so a product with int8 activations is exact
in them; of nf4's values in [-1, 1] that makes the nearest 127th, at most 0.004 away. The last two
are multiplied with activations as they are.

Stored, for a [rows, cols] matrix cut into blocks of B columns (B = group_size, or 32 for whole
rows):

  weight_packed  uint8 [rows, cols*b/8]   codes as `codes.py` packs them, as `integer` has them
  weight_scales  [rows, groups] bfloat16, float16 or float32
  weight_table   int8 [rows/table_rows, 2^b], learned only

Fails where: cols is no multiple of group_size and 32; groups beyond bfloat16's range; cuts inside
`table_rows` rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar

from compress_methods.errors import FormatError
from compress_methods.formats.base import (
    MAIN_TENSOR,
    Axis,
    TensorSpec,
    register_format,
    torch_dtype,
)
from compress_methods.formats.encoding.codes import chosen, pack_codes, unpack_codes
from compress_methods.formats.encoding.grouped import (
    GROUP_SIZES,
    SCALES,
    Grouped,
    require_known,
    spread,
    stored_scales,
)
from compress_methods.formats.encoding.relaxed_levels import RelaxedLevels, distinct
from compress_methods.formats.fitting.least_squares import Unscaled, refit_tables
from compress_methods.formats.fitting.range_search import search_scales
from compress_methods.formats.fitting.table_search import binary_basis, over, search_tables
from compress_methods.formats.relaxed import stored_as
from compress_methods.formats.rounder import entries_at
from compress_methods.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

TABLE = "weight_table"
LEARNED, BINARY = FITTED = ("learned", "binary")
FIXED = MappingProxyType(
    {
        "nf4": (-127, -88, -67, -50, -36, -23, -12, 0, 10, 20, 31, 43, 56, 71, 92, 127),
        "fp4": (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12),
        "iq4": (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113),
        "bnb_nf4": (
            *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
            *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
            *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
            *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
        ),
        "bnb_fp4": tuple(s * v / 12 for s in (1, -1) for v in (0, 1 / 16, 8, 12, 4, 6, 2, 3)),
    }
)
"""By code; those of fp4 in halves, those of nf4 in 127ths."""
OF_FLOATS = ("bnb_nf4", "bnb_fp4")
BITS = (2, 3, 4)
FIXED_BITS = 4
TABLE_ROWS = (1, 16, 32, 64, 128)
SCALE_DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class LookupSolution:
    """Codes uint8 [rows, cols]; scales [rows, groups]; table int8 [tables, 2^b], one in all where
    it is fixed, float32 where it is of floats."""

    codes: Tensor
    scales: Tensor
    table: Tensor


@register_format
@dataclass(frozen=True)
class Lookup(Grouped):
    """b-bit codes of a table, which groups of columns scale; weight-only."""

    bits: int = 4
    group_size: int = 128
    table: str = LEARNED
    table_rows: int = 16
    scale_dtype: str = SCALE_DTYPES[0]
    name: ClassVar[str] = "lookup"
    symmetric: ClassVar[bool] = True
    """Scales, and nothing else, decide what a group's values are."""

    def __post_init__(self) -> None:
        require_known(
            (
                ("bits", self.bits, BITS),
                ("group_size", self.group_size, GROUP_SIZES),
                ("table", self.table, (*FITTED, *FIXED)),
                ("table_rows", self.table_rows, TABLE_ROWS),
                ("scale_dtype", self.scale_dtype, SCALE_DTYPES),
            )
        )
        if self.table in FIXED and self.bits != FIXED_BITS:
            raise FormatError(f"bits is {self.bits}, expected {FIXED_BITS} for {self.table}")

    @property
    def learns_values(self) -> bool:
        """If so, tables are stored."""
        return self.table in FITTED

    @property
    def of_floats(self) -> bool:
        """Whether the table has floats, not whole numbers."""
        return self.table in OF_FLOATS

    @property
    def holds_zero(self) -> bool:
        return not self.learns_values and 0 in FIXED[self.table]

    @property
    def lopsided(self) -> bool:
        """Whether a fixed table, turned round, is another."""
        return self.table in ("nf4", "iq4", "bnb_nf4")

    def tensors(self, rows: int, cols: int) -> dict[str, TensorSpec]:
        out = self.codes_and_scales(rows, cols, self.scale_dtype)
        if self.learns_values:
            by_rows = Axis(0, self.table_rows)
            out[TABLE] = TensorSpec((by_rows.entries(rows), 2**self.bits), "int8", by_rows)
        return out

    def fixed_table(self, like: Tensor) -> Tensor:
        """int8, or float32, [1, 2^b] where `like` is."""
        dtype = torch.float32 if self.of_floats else torch.int8
        return torch.tensor([FIXED[self.table]], dtype=dtype, device=like.device)

    def by_row(self, table: Tensor, rows: int) -> Tensor:
        """The table [rows, 2^b] of each row, in the dtype of `table`."""
        if not self.learns_values:
            return table.expand(rows, -1)
        return table.repeat_interleave(self.table_rows, 0)[:rows]

    def extent(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """What a group of a fixed table has to reach: [rows, groups] each."""
        high = weight.reshape(len(weight), self.groups(weight.shape[1]), -1).abs().amax(-1)
        return -high, high

    def scales_of(self, low: Tensor, high: Tensor) -> tuple[Tensor, None]:
        """Scales of groups of a fixed table that reach from low to high."""
        reach = 2 * max(FIXED[self.table])
        return ((high - low) / reach).to(torch_dtype(self.scale_dtype)), None

    def encode(self, values: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
        """Nearest codes of a fixed table; scales broadcast against values [rows, ...]."""
        table = Tables(self.fixed_table(values))
        return table.encode(over(values, scales).flatten(1)).reshape(values.shape)

    def decode(self, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
        """What codes of a fixed table stand for."""
        return (
            Tables(self.fixed_table(codes)).decode(codes.flatten(1)).reshape(codes.shape) * scales
        )

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Scales [rows, groups] and tables of least squared error, weighted by `importance`. Of a
        fixed table, without it, scales that clip no value."""
        if self.learns_values:
            return search_tables(self, weight, importance)
        if importance is None:
            return self.scales_of(*self.extent(weight))[0], self.fixed_table(weight)
        return search_scales(self, weight, importance)[0], self.fixed_table(weight)

    def grid(self, weight: Tensor, importance: Tensor | None = None) -> TableGrid:
        return TableGrid(self, *self.fit(weight, importance))

    def nearest(
        self, weight: Tensor, importance: Tensor | None = None, mask: Tensor | None = None
    ) -> LookupSolution:
        return self.round_to(weight, *self.fit(weight, importance))

    def round_to(self, weight: Tensor, scales: Tensor, table: Tensor) -> LookupSolution:
        """Every value of `weight` rounded to the nearest of given scales and tables."""
        tables = Tables(self.by_row(table, len(weight)))
        codes = tables.encode(over(weight, spread(scales.float(), weight.shape[1])))
        return LookupSolution(codes, scales, table)

    def matrix(self, solution: LookupSolution) -> Tensor:
        """[rows, cols] float32 values of a solution."""
        values = self._table_values(solution)
        return values * spread(solution.scales.float(), values.shape[1])

    def _table_values(self, solution: LookupSolution) -> Tensor:
        return Tables(self.by_row(solution.table, len(solution.codes))).decode(solution.codes)

    def grid_of(self, solution: LookupSolution) -> TableGrid:
        return TableGrid(self, solution.scales, solution.table)

    def unscaled(self, solution: LookupSolution) -> Unscaled:
        return Unscaled(self._table_values(solution), solution.scales)

    def rescaled(self, solution: LookupSolution, scales: Tensor) -> LookupSolution:
        return replace(solution, scales=scales)

    def refit(self, solution: LookupSolution, weight: Tensor, hessian: Tensor) -> LookupSolution:
        """Scales of least squares for the table there is, then tables for these scales."""
        solution = super().refit(solution, weight, hessian)
        if not self.learns_values:
            return solution
        basis = binary_basis(self.bits, weight) if self.table == BINARY else None
        scales = spread(solution.scales.float(), weight.shape[1])
        table = refit_tables(
            solution.codes, scales, solution.table, self.table_rows, weight, hessian, basis
        )
        return replace(solution, table=table)

    def relax(self, solution: LookupSolution, weight: Tensor) -> RelaxedLookup:
        return RelaxedLookup(self, solution, weight)

    def pack(self, solution: LookupSolution) -> dict[str, Tensor]:
        scales = stored_scales(solution.scales, self.scale_dtype)
        out = {MAIN_TENSOR: pack_codes(solution.codes, self.bits, self.block), SCALES: scales}
        if self.learns_values:
            out[TABLE] = solution.table.contiguous()
        return out

    def solution(self, tensors: Mapping[str, Tensor]) -> LookupSolution:
        """Inverse of `pack`."""
        packed = tensors[MAIN_TENSOR]
        table = tensors[TABLE] if self.learns_values else self.fixed_table(packed)
        return LookupSolution(unpack_codes(packed, self.bits, self.block), tensors[SCALES], table)

    @property
    def cut_by(self) -> str:
        return "group_size or table_rows" if self.learns_values else "group_size"

    def describe(self) -> str:
        group = self.group_name
        if not self.learns_values:
            return f"{self.table} {group}"
        kind = "lookup" if self.table == LEARNED else self.table
        rows = "row" if self.table_rows == 1 else f"{self.table_rows} rows"
        return f"{kind}{self.bits} {group}, table per {rows}"


class Tables:
    """Tables [rows, 2^b], or [1, 2^b] for all rows: nearest codes and values."""

    def __init__(self, tables: Tensor) -> None:
        self.values = tables.float()
        ascending, self._order = self.values.sort(dim=1, stable=True)
        self._middles = (ascending[:, 1:] + ascending[:, :-1]) / 2

    def encode(self, values: Tensor) -> Tensor:
        """Codes uint8 [rows, n] of the table values nearest to `values` [rows, n]."""
        place = torch.zeros_like(values, dtype=torch.uint8)
        for middle in self._middles.unbind(1):
            place += values > middle[:, None]
        return chosen(self._order.to(torch.uint8), place)

    def decode(self, codes: Tensor) -> Tensor:
        """float32 values [rows, n] of codes [rows, n]."""
        return chosen(self.values, codes)


class TableGrid:
    """scale * table[code], scales [rows, groups] by groups of columns."""

    def __init__(self, fmt: Lookup, scales: Tensor, table: Tensor) -> None:
        self.fmt, self.scales, self.table = fmt, scales, table
        self._tables = Tables(fmt.by_row(table, len(scales)))
        self._scales = scales.T.float().contiguous()

    def pick(self, column: int | Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        scales = entries_at(self._scales, column, self.fmt.group_size)
        codes = self._tables.encode(over(weights, scales)[:, None])
        return codes[:, 0], self._tables.decode(codes)[:, 0] * scales

    def solution(self, codes: Tensor) -> LookupSolution:
        return LookupSolution(codes, self.scales, self.table)


class RelaxedLookup(RelaxedLevels):
    """Places in the tables there are, and scales."""

    def __init__(self, fmt: Lookup, solution: LookupSolution, weight: Tensor) -> None:
        self.fmt, self._table, self._scales = fmt, solution.table, solution.scales.float()
        codes = torch.arange(2**fmt.bits, dtype=torch.uint8, device=weight.device)
        if fmt.learns_values:
            levels, order = fmt.by_row(solution.table, len(weight)).float().sort(dim=1, stable=True)
            stored = codes[order]
        else:
            levels, stored = distinct(solution.table[0].float(), codes)
        values = over(weight, spread(self._scales, weight.shape[1]))
        super().__init__(levels, stored, values, self._scales)

    def matrix(self, parameters: Mapping[str, Tensor]) -> Tensor:
        dtype = torch_dtype(self.fmt.scale_dtype)
        scales = stored_as(self._scales * parameters["factors"], dtype)
        values = self.values(parameters["codes"])
        return values * spread(scales, values.shape[1])

    def hold(self, solution: LookupSolution) -> None:
        self.hold_values(self.fmt._table_values(solution))

    def solution(self) -> LookupSolution:
        dtype = torch_dtype(self.fmt.scale_dtype)
        scales = (self._scales * self.parameters["factors"]).to(dtype)
        return LookupSolution(self.codes(), scales, self._table)
