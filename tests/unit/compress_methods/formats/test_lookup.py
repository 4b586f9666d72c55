"""Tables: what they hold, what they take, how near the nearest value is."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress_methods.formats import Format
from compress_methods.formats.fitting.table_search import NORMAL, binary_basis
from compress_methods.formats.integer import Integer
from compress_methods.formats.lookup import FIXED, Lookup
from tests.unit.compress_methods.drawn import lookups, matrices

NF4 = (-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0)


def random(rows: int = 64, cols: int = 512, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


def loss(fmt: Format, weight: torch.Tensor, importance: torch.Tensor | None = None) -> float:
    """Squared error, weighted as the fit is, of what is stored."""
    squares = (fmt.unpack(fmt.pack(fmt.nearest(weight, importance))) - weight).square()
    return float((squares if importance is None else squares * importance).sum())


@given(matrices(lookups()))
def test_no_value_of_its_table_is_nearer_to_a_weight(drawn: tuple[Lookup, torch.Tensor]) -> None:
    fmt, weight = drawn
    solution = fmt.nearest(weight)
    groups = solution.scales.shape[1]
    scales = solution.scales.double().repeat_interleave(weight.shape[1] // groups, 1)
    tables = fmt.by_row(solution.table, len(weight)).double()
    errors = (tables[:, None] * scales[..., None] - weight[..., None]).abs()
    found = (fmt.matrix(solution) - weight).abs().double()
    assert bool((found <= errors.amin(-1) * (1 + 1e-5) + scales.abs() * 1e-4).all())
    assert bool((fmt.matrix(solution)[(weight == 0).all(1)] == 0).all())


def test_fixed_tables_are_those_of_their_papers() -> None:
    floats = [m * 2.0**e for e, m in ((0, 0), (0, 0.5), (0, 1), (0, 1.5), (1, 1), (1, 1.5))]
    assert FIXED["fp4"][:8] == tuple(round(2 * f) for f in (*floats, 4.0, 6.0))
    assert FIXED["fp4"][8:] == tuple(-value for value in FIXED["fp4"][:8])
    assert FIXED["nf4"][:8] == tuple(round(127 * value) for value in NF4)
    assert FIXED["nf4"][15] == 127
    assert list(FIXED["nf4"]) == sorted(FIXED["nf4"])


@pytest.mark.parametrize("bits", NORMAL)
def test_the_start_is_the_best_table_for_normal_weights(bits: int) -> None:
    """Every value is the mean of the normal weights that are nearest to it."""
    half = torch.tensor(NORMAL[bits], dtype=torch.float64)
    values = torch.cat([-half.flip(0), half])
    inner = (values[1:] + values[:-1]) / 2
    edges = torch.cat([torch.tensor([-math.inf]), inner, torch.tensor([math.inf])])
    density = torch.exp(-(edges**2) / 2) / math.sqrt(2 * math.pi)
    share = torch.special.ndtr(edges).diff()
    torch.testing.assert_close(-density.diff() / share, values, rtol=0, atol=2e-3)


def test_binary_tables_are_sums_of_scales() -> None:
    fmt = Lookup(3, 64, "binary")
    tables = fmt.nearest(random()).table.float()
    basis = binary_basis(3, tables)
    parts = torch.linalg.lstsq(basis, tables.T).solution
    torch.testing.assert_close((basis @ parts).T, tables)
    assert torch.equal(parts.round(), parts.round(decimals=3))


def test_bits_per_weight_are_bits_scales_and_tables_and_nothing_else() -> None:
    rows, cols = 256, 1024
    for bits in (2, 3, 4):
        for table_rows in (1, 16, 128):
            size = 8 * Lookup(bits, 128, table_rows=table_rows).nbytes(rows, cols)
            assert size / (rows * cols) == bits + 16 / 128 + 8 * 2**bits / (table_rows * cols)
    assert 8 * Lookup(4, 64, "nf4").nbytes(rows, cols) / (rows * cols) == 4 + 16 / 64


@pytest.mark.parametrize("skew", [False, True])
def test_learned_tables_lose_less_than_even_steps(skew: bool) -> None:
    weight = random().abs() ** 1.5 * random(seed=1).sign() if skew else random()
    importance = random(1, 512, 2)[0].square() + 0.1
    for bits, factor in ((2, 0.99), (3, 0.92), (4, 0.86)):
        even = Integer(bits, 128, levels="mid" if bits == 2 else "whole")
        learned = loss(Lookup(bits, 128), weight, importance)
        assert learned < factor * loss(even, weight, importance)
        own = loss(Lookup(bits, 128, table_rows=1), weight, importance)
        assert own < 1.005 * learned
        assert learned < loss(Lookup(bits, 128, "binary"), weight, importance)


@settings(max_examples=20)
@given(lookups(), st.integers(0, 99))
def test_importance_lowers_what_it_weighs(fmt: Lookup, seed: int) -> None:
    weight = random(16, 256, seed)
    importance = random(1, 256, seed + 1)[0].square() ** 2 + 0.01
    plain = (fmt.matrix(fmt.nearest(weight)) - weight).square() * importance
    assert loss(fmt, weight, importance) < float(plain.sum())
