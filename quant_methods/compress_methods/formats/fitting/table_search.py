"""k-means: tables and scales of least weighted squared error, each fitted in turn.

For every table T and the groups g of the rows that share it, codes c minimize

  sum_j h_j (w_j - s_g T[c_j])^2

h being the Hessian's diagonal where there is one, else 1 (SqueezeLLM, Kim et al., 2023,
arXiv:2306.07629, has one table per row and no scales). A round gives every value the nearest code,
every entry of a table the weighted mean of what has its code, every scale its least squares;
some search multiples of the scales first, of either sign, which alone gets out of local optima.
Starts at the table that is best for normal weights, scales at the root mean square of their group,
with the sign of what is largest there, so that tables can reach further on one side. Works through
slabs of rows that fit a core's cache.

Tables are then rounded to whole numbers, the largest of which is `TOP` in magnitude: some room to
127 is left for what later refits. Never finds more than a local optimum.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress_methods.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from compress_methods.formats.lookup import Lookup

ROUNDS = 8
SEARCHES = (1, 3, 5)
FACTORS = tuple(sign * size / 10 for sign in (1, -1) for size in range(7, 14))
TOP = 120
MOST = 127
SLAB_ELEMENTS = 2**19
NORMAL = {
    2: (0.4528, 1.5104),
    3: (0.2451, 0.7560, 1.3439, 2.1520),
    4: (0.1284, 0.3881, 0.6568, 0.9423, 1.2562, 1.6180, 2.0690, 2.7326),
}
"""Positive half of the best values for a normal distribution (Max, 1960)."""


def binary_basis(bits: int, like: Tensor) -> Tensor:
    """float32 [2^b, b]: for every code, +1 where a bit is set, else -1."""
    codes = torch.arange(2**bits, device=like.device)[:, None]
    places = torch.arange(bits, device=like.device)
    return 2.0 * (codes >> places & 1) - 1.0


def search_tables(
    fmt: Lookup, weight: Tensor, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scales [rows, groups] as they are stored and tables int8 [tables, 2^b] for `weight`
    [rows, cols]; importance [cols], [rows, cols] or None."""
    rows, cols = weight.shape
    step = max(1, SLAB_ELEMENTS // cols // fmt.table_rows) * fmt.table_rows
    found = []
    for first in range(0, rows, step):
        slab = weight[first : first + step]
        weights = importance
        if importance is not None and importance.dim() == 2:
            weights = importance[first : first + step]
        found.append(_Fit(fmt, slab, weights).run())
    return torch.cat([scales for scales, _ in found]), torch.cat([table for _, table in found])


class _Fit:
    """Of some rows, padded to whole tables: groups [tables, table_rows, groups, size]."""

    def __init__(self, fmt: Lookup, weight: Tensor, importance: Tensor | None) -> None:
        self.fmt, self.rows = fmt, len(weight)
        groups = fmt.groups(weight.shape[1])
        padding = -self.rows % fmt.table_rows

        def laid_out(x: Tensor) -> Tensor:
            padded = torch.nn.functional.pad(x.float(), (0, 0, 0, padding))
            return padded.reshape(-1, fmt.table_rows, groups, x.shape[1] // groups)

        if importance is None:
            importance = torch.ones_like(weight)
        importance = importance / importance.mean().clamp_(min=torch.finfo().tiny)
        self.weights = laid_out(importance.expand_as(weight).clamp(min=1e-6))
        values = laid_out(weight)
        # Of magnitude 1, so that squares neither overflow nor vanish.
        self.size = values.abs().amax((1, 2, 3), keepdim=True)
        self.size = torch.where(self.size == 0, torch.ones_like(self.size), self.size)
        self.values = values / self.size
        self.basis = binary_basis(fmt.bits, weight) if fmt.table == "binary" else None

    def run(self) -> tuple[Tensor, Tensor]:
        scales = self._start()
        half = torch.tensor(NORMAL[self.fmt.bits], device=scales.device)
        table = torch.cat([-half.flip(0), half]).expand(len(self.values), -1)
        if self.basis is not None:
            table = self._binary(table, torch.ones_like(table))
        for turn in range(ROUNDS):
            if turn in SEARCHES:
                scales = self._search(scales, table)
            codes = self._nearest(scales, table)
            table = self._means(codes, scales, table)
            scales = self._least_squares(codes, scales, table)
        top = table.abs().amax(1, keepdim=True)
        table = self._whole(table * (TOP / top))
        scales = scales * (top / TOP)[:, :, None] * self.size[..., 0]
        stored = scales.to(getattr(torch, self.fmt.scale_dtype))
        return stored.flatten(0, 1)[: self.rows], table

    def _whole(self, table: Tensor) -> Tensor:
        # Columns of the basis are orthogonal.
        parts = table if self.basis is None else table @ self.basis / len(self.basis)
        return whole_table(parts, self.basis)

    def _start(self) -> Tensor:
        size = self.values.square().mean(-1).sqrt()
        largest = self.values.gather(-1, self.values.abs().argmax(-1, keepdim=True))[..., 0]
        return size.copysign(largest)

    def _search(self, scales: Tensor, table: Tensor) -> Tensor:
        """The best of some multiples of the scales there are, of either sign."""
        ascending = table.sort(dim=1).values[:, :, None, None, None]
        middles, steps = (ascending[:, 1:] + ascending[:, :-1]) / 2, ascending.diff(dim=1)
        best, least = scales, torch.full_like(scales, torch.inf)
        for factor in FACTORS:
            tried = scales * factor
            scaled = over(self.values, tried[..., None])
            values = ascending[:, 0].expand_as(scaled).clone()
            for middle, step in zip(middles.unbind(1), steps.unbind(1), strict=True):
                values += torch.where(scaled > middle, step, 0.0)
            errors = scaled.sub_(values).square_().mul_(self.weights).sum(-1) * tried.square()
            best = torch.where(errors < least, tried, best)
            least = torch.minimum(errors, least)
        return best

    def _nearest(self, scales: Tensor, table: Tensor) -> Tensor:
        """Codes uint8 like `values`."""
        ascending, order = table.sort(dim=1)
        middles = (ascending[:, 1:] + ascending[:, :-1]) / 2
        places = torch.zeros_like(self.values, dtype=torch.uint8)
        scaled = over(self.values, scales[..., None])
        for middle in middles.unbind(1):
            places += scaled > middle[:, None, None, None]
        if self.basis is None:
            return places
        return order.gather(1, places.flatten(1).long()).to(torch.uint8).reshape(places.shape)

    def _means(self, codes: Tensor, scales: Tensor, table: Tensor) -> Tensor:
        """Tables of least squares; entries that no value has stay."""
        scales = scales[..., None]
        moment = self.weights * scales
        pull, mass = moment * self.values, moment * scales
        sums, masses = [], []
        for code in range(table.shape[1]):
            here = codes == code
            sums.append((pull * here).sum((1, 2, 3)))
            masses.append((mass * here).sum((1, 2, 3)))
        total, count = torch.stack(sums, 1), torch.stack(masses, 1)
        found = torch.where(count > 0, total / count.clamp(min=torch.finfo().tiny), table)
        return found if self.basis is None else self._binary(found, count)

    def _binary(self, table: Tensor, mass: Tensor) -> Tensor:
        """The nearest table that is made of b scales, entries counting by their `mass`."""
        assert self.basis is not None
        gram = torch.einsum("ka,tk,kb->tab", self.basis, mass, self.basis)
        gram.diagonal(dim1=1, dim2=2).add_(1e-6 * mass.mean(1, keepdim=True) + 1e-30)
        pull = (mass * table) @ self.basis
        parts = torch.linalg.solve(gram, pull[..., None])[..., 0]
        return parts.abs().sort(dim=1).values @ self.basis.T

    def _least_squares(self, codes: Tensor, scales: Tensor, table: Tensor) -> Tensor:
        places = codes.flatten(1).long()
        values = table.gather(1, places).reshape(codes.shape)
        weighted = self.weights * values
        mass = (weighted * values).sum(-1)
        found = (weighted * self.values).sum(-1) / mass.clamp(min=torch.finfo().tiny)
        return torch.where(mass > 0, found, scales)


def over(values: Tensor, scales: Tensor) -> Tensor:
    """values / scales, where scales are zero the values."""
    return values / torch.where(scales == 0, torch.ones_like(scales), scales)


def whole_table(parts: Tensor, basis: Tensor | None) -> Tensor:
    """int8 [tables, 2^b] of float tables, or of the scales [tables, b] that binary ones are made
    of; what lies beyond 127 is cut."""
    if basis is None:
        return parts.round().clamp_(-MOST, MOST).to(torch.int8)
    return (parts.round() @ basis.T).clamp_(-MOST, MOST).to(torch.int8)
