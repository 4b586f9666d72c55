"""`svd` against what its base does alone, and against its own definition."""

from __future__ import annotations

import pytest
import torch

from compress_methods.algorithms.gptq import GPTQ
from compress_methods.algorithms.rtn import RoundToNearest
from compress_methods.algorithms.statistics import (
    Drift,
    Hessian,
    InputNorms,
    Seen,
    relative_error,
)
from compress_methods.algorithms.svd import SVD
from compress_methods.conversion.passes.packing import solve_in_slabs
from compress_methods.errors import RecipeError
from compress_methods.formats import Format
from compress_methods.formats.dense import Dense
from compress_methods.formats.integer import Integer
from compress_methods.formats.sparse import Sparse
from compress_methods.formats.wrappers.lowrank import LowRank
from compress_methods.formats.wrappers.rotated import Rotated
from tests.unit.compress_methods.algorithms.test_algorithms import aimed, correlated, gathered

INT2, INT4 = Integer(2, 64, levels="mid"), Integer(4, 64)


def drawn(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


def loss(
    algorithm: SVD | GPTQ | RoundToNearest, fmt: Format, weight: torch.Tensor, seen: Seen
) -> float:
    solution = algorithm.fill(weight, algorithm.ready(seen, fmt), fmt)
    return relative_error(weight, fmt.matrix(solution), seen)


@pytest.mark.parametrize("base", ["gptq", {"algorithm": "gptq", "clip": True}, "rtn"])
@pytest.mark.parametrize("fmt", [INT2, Rotated(INT4, 64), Sparse(32, 64, INT4)])
def test_what_the_base_lost_becomes_less(base: str | dict, fmt: Format) -> None:
    weight, seen = drawn(96, 128), gathered(correlated(800, 128))
    algorithm = SVD(base)
    alone = loss(algorithm.first, fmt, weight, seen)  # type: ignore[arg-type]
    ranks = [loss(algorithm, LowRank(rank, fmt), weight, seen) for rank in (4, 16, 48)]
    assert alone > ranks[0] > ranks[1] > ranks[2]
    assert ranks[1] < 0.8 * alone
    plain = LowRank(16, fmt)
    assert ranks[1] < relative_error(weight, plain.matrix(plain.nearest(weight)), seen)


def test_factors_are_the_whitened_svd_of_the_bases_error() -> None:
    weight, seen, rank = drawn(80, 128), gathered(correlated(900, 128)), 8
    fmt, algorithm = LowRank(rank, INT2, Dense("float32")), SVD("gptq")
    prepared = algorithm.ready(seen, fmt)
    found = algorithm.fill(weight, prepared, fmt)
    base = GPTQ().fill(weight, GPTQ().ready(seen, INT2), INT2)
    assert torch.equal(found.base.codes, base.codes)
    error, hessian = (weight - INT2.matrix(base)).double(), Hessian.of(seen).double()
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(128)
    lower = torch.linalg.cholesky(damped)
    s = torch.linalg.svdvals(error @ lower)
    left = float(s[rank:].square().sum())
    rest = error - fmt.product(found).double()
    assert float((rest @ lower).square().sum()) == pytest.approx(left, rel=5e-3)
    assert prepared.hessian is not None
    torch.testing.assert_close(prepared.hessian.double(), damped, rtol=1e-5, atol=1e-6)


def test_alternating_never_loses_and_wins_at_two_bits() -> None:
    weight, seen = drawn(96, 128, 5), gathered(correlated(900, 128, 5))
    fmt = LowRank(16, INT2)
    for clip, least in ((True, 0.7), (False, 1.0)):
        base = {"algorithm": "gptq", "clip": clip}
        found = [loss(SVD(base, rounds=rounds), fmt, weight, seen) for rounds in (1, 2, 4)]
        assert found[0] >= found[1] >= found[2]
        assert found[2] <= least * found[0]


def test_alone_it_is_the_best_matrix_of_a_rank() -> None:
    weight, x = drawn(64, 96), correlated(700, 96)
    seen, fmt = gathered(x), LowRank(24, None, Dense("float32"))
    outputs = weight @ x.T
    s = torch.linalg.svdvals(outputs.double())
    best = float(s[24:].square().sum() / s.square().sum())
    assert best * 0.999 <= loss(SVD(damping=1e-6), fmt, weight, seen) <= best * 1.01


@pytest.mark.parametrize("base", [INT4, Rotated(INT4, 64), None])
def test_it_aims_where_the_base_algorithm_aims(base: Format | None) -> None:
    x, weight = correlated(700, 128), drawn(32, 128)
    original = x + 0.1 * correlated(700, 128, 1)
    drift = Drift(128, torch.device("cpu"))
    drift.add_pair(original, x, None)
    drift.tokens = len(x)
    seen = {**gathered(x), Drift: drift}
    fmt, algorithm = LowRank(4, base), SVD("gptq")
    assert set(algorithm.needs(fmt)) == {Hessian, Drift}
    found = aimed(algorithm, weight, seen, fmt)
    expected = aimed(GPTQ(), weight, seen, INT4)
    assert float((expected - weight).norm()) > 0.01 * float(weight.norm())
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    rounded = SVD("rtn")
    still = aimed(rounded, weight, seen, fmt)
    torch.testing.assert_close(still, weight, rtol=1e-5, atol=1e-5)


def test_other_formats_are_filled_by_the_base_alone() -> None:
    weight, seen = drawn(16, 128), gathered(correlated(300, 128))
    algorithm = SVD({"algorithm": "gptq", "clip": True})
    found = algorithm.fill(weight, algorithm.ready(seen, INT4), INT4)
    alone = GPTQ(clip=True)
    expected = alone.fill(weight, alone.ready(seen, INT4), INT4)
    assert torch.equal(found.codes, expected.codes)
    assert algorithm.needs(INT4) == alone.needs(INT4)
    assert SVD("wanda").needs(LowRank(4, Sparse(2, 4, INT4))) == (InputNorms, Hessian)
    assert SVD("rtn").needs(LowRank(4, INT4)) == (Hessian,)


def test_a_matrix_is_solved_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """B is that of all rows."""
    weight, seen, fmt = drawn(64, 128), gathered(correlated(300, 128)), LowRank(4, INT4)
    algorithm = SVD()
    prepared = algorithm.ready(seen, fmt)
    whole = fmt.pack(algorithm.fill(weight, prepared, fmt))
    monkeypatch.setattr("compress_methods.conversion.passes.packing.SOLVE_ELEMENTS", 1)
    found = solve_in_slabs(algorithm, fmt, weight.shape, [(weight, prepared)])
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())


def test_tokens_are_weighed_as_the_base_algorithm_asks() -> None:
    assert SVD({"algorithm": "gptq", "loss_groups": 4}).loss_groups == 4
    assert SVD().loss_groups == SVD("rtn").loss_groups == 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"base": "svt"}, "did you mean 'svd'"),
        ({"base": "refine"}, "base is 'refine', which refines already"),
        ({"rounds": 0}, "rounds is 0, expected a number up to 100"),
        ({"damping": 0}, "damping is 0"),
    ],
)
def test_bad_parameters_name_the_key(settings: dict, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        SVD(**settings)


def test_what_the_base_algorithm_cannot_fill_is_refused() -> None:
    SVD().check_format(LowRank(4))
    SVD("alps").check_format(LowRank(4, Sparse(2, 4, INT4)))
    with pytest.raises(RecipeError, match="'alps' cannot fill format 'integer'"):
        SVD("alps").check_format(LowRank(4, INT4))
    with pytest.raises(RecipeError, match="'gptq' cannot fill format 'lowrank'"):
        GPTQ().check_format(LowRank(4, INT4))


def test_the_recipes_mapping_builds_it_again() -> None:
    algorithm = SVD({"algorithm": "gptq", "clip": True}, rounds=2)
    assert SVD(**{k: v for k, v in algorithm.to_dict().items() if k != "algorithm"}) == algorithm
