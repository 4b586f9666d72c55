"""Revising codes and scales: never further from the target, and where one code is left the best."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress_methods.algorithms import Hessian
from compress_methods.algorithms.coordinate_descent import descend
from compress_methods.formats import Format
from compress_methods.formats.dense import Dense
from compress_methods.formats.integer import Integer
from compress_methods.formats.least_squares import Unscaled, refit_scales
from compress_methods.formats.sparse import Sparse
from tests.unit.compress_methods.algorithms.test_algorithms import correlated, gathered

FORMATS: list[Format] = [
    Integer(2, 32, levels="mid"),
    Integer(3, 64),
    Integer(4, -1, symmetric=False),
    Sparse(16, 32, Integer(4, 32)),
    Sparse(2, 4, Integer(3, -1)),
]
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
    solution = descend(weight, hessian, 1e-6, fmt, start, 3)
    after = errors(weight, fmt.matrix(solution), hessian)
    assert bool((after <= before * (1 + 1e-4)).all())
    assert float(after.sum()) < 0.8 * float(before.sum())
    stored = fmt.pack(solution)
    torch.testing.assert_close(fmt.unpack(stored), fmt.matrix(solution))


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


def test_scales_that_would_not_help_stay() -> None:
    weight, hessian = problem()
    zero = Unscaled(torch.zeros(ROWS, COLS), torch.full((ROWS, 3), 2.0))
    assert torch.equal(refit_scales(zero, weight, hessian), zero.scales)
