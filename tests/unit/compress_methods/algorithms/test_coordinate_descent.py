"""Revising codes and scales: never further from the target, and where one code is left the best."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress_methods.algorithms import Hessian
from compress_methods.algorithms.coordinate_descent import descend
from compress_methods.formats import Format
from compress_methods.formats.dense import Dense
from compress_methods.formats.encoding.small_floats import nearest_e4m3, nearest_power
from compress_methods.formats.fitting.least_squares import Unscaled, refit_scales, refit_tables
from compress_methods.formats.floats import Float
from compress_methods.formats.integer import Integer
from compress_methods.formats.lookup import Lookup
from compress_methods.formats.sparse import Sparse
from tests.unit.compress_methods.algorithms.test_algorithms import correlated, gathered

FORMATS: list[Format] = [
    Integer(2, 32, levels="mid"),
    Integer(3, 64),
    Integer(4, -1, symmetric=False),
    Sparse(16, 32, Integer(4, 32)),
    Sparse(2, 4, Integer(3, -1)),
    Lookup(3, 64, table_rows=1),
    Float("mxfp4"),
    Float("nvfp4"),
    Float("fp8", 64),
    Sparse(2, 4, Float("nvfp4")),
]
SHARED: list[Format] = [Lookup(2, 32), Lookup(3, -1, "binary"), Lookup(4, 64, "nf4")]
COLS, ROWS = 192, 24


def problem(seed: int = 0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return torch.randn(ROWS, COLS), Hessian.of(gathered(correlated(900, COLS, seed)))


def errors(weight: Tensor, values: Tensor, hessian: Tensor) -> Tensor:
    left = (weight - values).double()
    return ((left @ hessian.double()) * left).sum(1)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@settings(max_examples=10)
@given(seed=st.integers(0, 1000))
def test_every_row_comes_closer(fmt: Format, seed: int) -> None:
    weight, hessian = problem(seed)
    start = fmt.nearest(weight)
    before = errors(weight, fmt.matrix(start), hessian)
    kept = hessian.clone()
    solution = descend(weight, hessian, 1e-6, fmt, start, 3)
    assert torch.equal(hessian, kept)
    after = errors(weight, fmt.matrix(solution), hessian)
    assert bool((after <= before * (1 + 1e-4)).all())
    assert float(after.sum()) < 0.8 * float(before.sum())
    stored = fmt.pack(solution)
    torch.testing.assert_close(fmt.unpack(stored), fmt.matrix(solution))


@pytest.mark.parametrize("fmt", SHARED, ids=str)
@settings(max_examples=10)
@given(seed=st.integers(0, 1000))
def test_rows_that_share_a_table_come_closer_together(fmt: Format, seed: int) -> None:
    weight, hessian = problem(seed)
    start = fmt.nearest(weight)
    before = errors(weight, fmt.matrix(start), hessian)
    solution = descend(weight, hessian, 1e-6, fmt, start, 3)
    after = errors(weight, fmt.matrix(solution), hessian)
    for old, new in zip(before.split(16), after.split(16), strict=True):
        assert float(new.sum()) <= float(old.sum()) * (1 + 1e-4)
    assert float(after.sum()) < 0.8 * float(before.sum())


def test_no_single_code_is_better_than_the_one_found() -> None:
    fmt, (weight, hessian) = Integer(3, 64), problem()
    solution = descend(weight, hessian, 1e-6, fmt, fmt.nearest(weight), 50)
    best = errors(weight, fmt.matrix(solution), hessian)
    for column in range(0, COLS, 7):
        for step in (-1, 1):
            codes = solution.codes.clone().short()
            codes[:, column] = (codes[:, column] + step).clamp_(0, 7)
            other = type(solution)(codes.to(torch.uint8), solution.scales)
            assert bool((errors(weight, fmt.matrix(other), hessian) >= best * (1 - 1e-4)).all())


def test_a_format_without_codes_comes_out_as_it_went_in() -> None:
    weight, hessian = problem()
    fmt = Dense("float32")
    solution = fmt.nearest(weight)
    assert descend(weight, hessian, 0.01, fmt, solution, 2) is solution


def test_scales_are_those_of_least_squares() -> None:
    weight, hessian = problem()
    levels = torch.randint(-3, 4, (ROWS, COLS)).float()
    scales = refit_scales(Unscaled(levels, torch.ones(ROWS, 3)), weight, hessian)
    root = torch.linalg.cholesky(hessian.double() + 1e-9 * torch.eye(COLS))
    for row in range(0, ROWS, 5):
        by_group = levels[row].reshape(3, -1)
        design = torch.block_diag(*by_group).double() @ root
        expected = torch.linalg.lstsq(design.T, root.T @ weight[row].double()).solution
        torch.testing.assert_close(scales[row].double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("nearest", [nearest_power, nearest_e4m3])
@pytest.mark.parametrize("groups", [1, 3, 12])
def test_scales_of_few_values_are_the_best_of_these(
    groups: int, nearest: Callable[[Tensor], Tensor]
) -> None:
    """Of one group exactly; of several no row is further away than before."""
    weight, hessian = problem()
    levels = torch.randint(-3, 4, (ROWS, COLS)).float()
    weight = 0.4 * levels + 0.1 * weight
    start = Unscaled(levels, torch.ones(ROWS, groups), nearest)
    scales = refit_scales(start, weight, hessian)

    def error(scales: Tensor) -> Tensor:
        return errors(weight, levels * scales.repeat_interleave(COLS // groups, 1), hessian)

    assert torch.equal(nearest(scales), scales)
    assert bool((error(scales) < 0.5 * error(start.scales)).all())
    if groups == 1:
        for value in (0.125, 0.25, 0.375, 0.40625, 0.4375, 0.5, 1.0):
            tried = nearest(torch.full((ROWS, 1), value))
            assert bool((error(scales) <= error(tried) * (1 + 1e-6)).all())


@pytest.mark.parametrize("basis", [None, torch.tensor([[-1.0, -1], [1, -1], [-1, 1], [1, 1]])])
def test_tables_are_those_of_least_squares(basis: Tensor | None) -> None:
    """Rounded to whole numbers; an entry that no value has stays as it is."""
    weight, hessian = problem()
    weight = 40 * weight
    codes = torch.randint(0, 4, (ROWS, COLS)).to(torch.uint8)
    if basis is None:
        codes[:16] %= 3
    scales = torch.rand(ROWS, COLS) + 0.5
    start = torch.full((2, 4), 99, dtype=torch.int8)
    found = refit_tables(codes, scales, start, 16, weight, hessian, basis)
    root = torch.linalg.cholesky(hessian.double() + 1e-9 * torch.eye(COLS))
    for table, rows in enumerate((slice(0, 16), slice(16, ROWS))):
        chosen = torch.nn.functional.one_hot(codes[rows].long(), 4) * scales[rows, :, None]
        design = torch.einsum("rck,cd->rdk", chosen.double(), root).flatten(0, 1)
        aim = (weight[rows].double() @ root).flatten()
        if basis is None:
            expected = torch.linalg.lstsq(design[:, : 3 + table], aim).solution
            assert table or int(found[0, 3]) == 99
        else:
            expected = basis.double() @ torch.linalg.lstsq(design @ basis.double(), aim).solution
        worst = 0.51 * (1 if basis is None else 2)
        assert float((found[table, : len(expected)] - expected).abs().max()) < worst


def test_scales_that_would_not_help_stay() -> None:
    weight, hessian = problem()
    zero = Unscaled(torch.zeros(ROWS, COLS), torch.full((ROWS, 3), 2.0))
    assert torch.equal(refit_scales(zero, weight, hessian), zero.scales)
