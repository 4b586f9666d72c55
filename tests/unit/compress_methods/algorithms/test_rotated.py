"""Algorithms in a rotated basis: the problem they are given is the same one, turned."""

from __future__ import annotations

import pytest
import torch

from compress_methods.algorithms.base import Algorithm
from compress_methods.algorithms.gptq import GPTQ
from compress_methods.algorithms.rtn import RoundToNearest
from compress_methods.algorithms.statistics import (
    Drift,
    Hessian,
    InputNorms,
    Seen,
    TurnedSeen,
    relative_error,
)
from compress_methods.conversion.passes.packing import solve_in_slabs
from compress_methods.errors import CalibrationError
from compress_methods.formats import Format
from compress_methods.formats.integer import Integer
from compress_methods.formats.wrappers.rotated import Rotated
from tests.unit.compress_methods.algorithms.test_algorithms import aimed

INT4 = Integer(4, 64)
CPU = torch.device("cpu")


def heavy(tokens: int, cols: int, seed: int = 0) -> torch.Tensor:
    """Correlated inputs with a few columns that are much larger than others."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, cols, generator=generator)
    x = x @ torch.randn(cols, cols, generator=generator) / cols**0.5
    x[:, ::37] *= 8
    return x


def gathered(x: torch.Tensor) -> Seen:
    hessian = Hessian(x.shape[1], x.device)
    hessian.add_batch(x)
    hessian.tokens = len(x)
    return {Hessian: hessian}


def filled(algorithm: Algorithm, weight: torch.Tensor, seen: Seen, fmt: Format) -> torch.Tensor:
    return fmt.matrix(algorithm.fill(weight, algorithm.ready(seen, fmt), fmt))


def test_a_turned_hessian_is_that_of_turned_inputs() -> None:
    fmt, x = Rotated(INT4), heavy(500, 320)
    seen = gathered(x)
    before = Hessian.of(seen).clone()
    turned = seen[Hessian].turned(fmt)
    expected = Hessian.of(gathered(fmt.turn_inputs(x)))
    torch.testing.assert_close(turned.result(), expected, rtol=1e-4, atol=1e-4)
    assert turned.tokens == 500
    assert torch.equal(Hessian.of(seen), before)


@pytest.mark.parametrize("algorithm", [GPTQ(clip=True), RoundToNearest(clip=True)])
def test_an_algorithm_solves_the_turned_problem(algorithm: Algorithm) -> None:
    fmt, x = Rotated(INT4), heavy(900, 320)
    weight = torch.randn(200, 320, generator=torch.Generator().manual_seed(2))
    mine = algorithm.fill(weight, algorithm.ready(gathered(x), fmt), fmt)
    turned, seen = fmt.turn(weight), {Hessian: gathered(x)[Hessian].turned(fmt)}
    theirs = algorithm.solve(turned, algorithm.prepare(seen, INT4), INT4)
    assert torch.equal(mine.codes, theirs.codes)
    error = relative_error(weight, fmt.matrix(mine), gathered(x))
    assert error == pytest.approx(relative_error(turned, INT4.matrix(theirs), seen), rel=1e-3)


def test_formats_that_are_not_turned_are_filled_as_they_are() -> None:
    x, weight = heavy(300, 128), torch.randn(16, 128)
    seen = gathered(x)
    direct = INT4.matrix(GPTQ().solve(weight, GPTQ().prepare(seen, INT4), INT4))
    assert torch.equal(filled(GPTQ(), weight, seen, INT4), direct)


def test_gptq_loses_less_in_the_rotated_basis_of_heavy_weights() -> None:
    x = heavy(2000, 256)
    weight = torch.randn(128, 256, generator=torch.Generator().manual_seed(4)) ** 3
    seen, rotated = gathered(x), Rotated(INT4)
    plain = relative_error(weight, filled(GPTQ(clip=True), weight, seen, INT4), seen)
    turned = relative_error(weight, filled(GPTQ(clip=True), weight, seen, rotated), seen)
    assert turned < 0.7 * plain
    rounded = relative_error(weight, filled(RoundToNearest(), weight, seen, rotated), seen)
    assert turned < 0.6 * rounded


def test_slabs_of_rows_are_cut_between_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, fmt = torch.randn(320, 128), Rotated(INT4)
    seen = gathered(heavy(300, 128))
    algorithm = GPTQ()
    prepared = algorithm.ready(seen, fmt)
    whole = solve_in_slabs(algorithm, fmt, weight.shape, [(weight, prepared)])
    for elements in (1, 300 * 128):
        monkeypatch.setattr("compress_methods.conversion.passes.packing.SOLVE_ELEMENTS", elements)
        slabs = solve_in_slabs(algorithm, fmt, weight.shape, [(weight, prepared)])
        same = (fmt.unpack(slabs) - fmt.unpack(whole)).abs() < 1e-5
        assert float(same.float().mean()) > 0.95  # codes on an edge may fall either way


def test_what_does_not_tell_how_columns_go_together_is_refused() -> None:
    with pytest.raises(CalibrationError, match=r"InputNorms does not tell.*choose.*gptq, or rtn"):
        InputNorms.of(TurnedSeen({InputNorms: InputNorms(128, CPU)}, Rotated(INT4)))


@pytest.mark.parametrize("adds", [True, False])
def test_what_a_matrix_should_be_close_to_is_the_same_in_every_basis(adds: bool) -> None:
    """The target of least squares, whichever basis its factor is of."""
    x, weight = heavy(700, 192), torch.randn(96, 192, generator=torch.Generator().manual_seed(5))
    original = x + 0.1 * heavy(700, 192, seed=1)
    drift = Drift(192, CPU)
    drift.add_pair(original, x, torch.randn(700, 96) if adds else None)
    drift.tokens = len(x)
    seen = {**gathered(x), Drift: drift}
    found = [aimed(GPTQ(), weight, seen, fmt) for fmt in (INT4, Rotated(INT4))]
    moved = float((found[0] - weight).norm())
    assert moved > 0.01 * float(weight.norm())
    assert float((found[0] - found[1]).norm()) < 1e-3 * moved
