"""Sparsity algorithms against their definitions, least squares and each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from compress_methods.algorithms import ALGORITHMS, Algorithm
from compress_methods.algorithms.error_feedback import NEVER_ACTIVE, error_feedback, factorize
from compress_methods.algorithms.gptq import GPTQ
from compress_methods.algorithms.pruning.alps import ALPS, refit, scale_hessian
from compress_methods.algorithms.pruning.magnitude import Magnitude
from compress_methods.algorithms.pruning.sparsegpt import SparseGPT
from compress_methods.algorithms.pruning.wanda import Wanda
from compress_methods.algorithms.statistics import Hessian, InputNorms, Seen, relative_error
from compress_methods.errors import RecipeError
from compress_methods.formats import Format
from compress_methods.formats.dense import Dense
from compress_methods.formats.integer import Integer
from compress_methods.formats.sparse import Sparse, SparseSolution
from compress_methods.recipe.schema import parse_recipe

SPARSIFIERS: tuple[Algorithm, ...] = (Magnitude(), Wanda(), SparseGPT(), ALPS())
PATTERNS = ((1, 4), (2, 4), (4, 4), (3, 8), (12, 16), (38, 128), (64, 128))
DENSE = Dense("float32")


def inputs(tokens: int, cols: int, seed: int = 0) -> Tensor:
    """Correlated inputs, some columns much larger than others."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(cols, cols, generator=generator) / cols**0.5
    scale = torch.exp(torch.randn(cols, generator=generator))
    return (torch.randn(tokens, cols, generator=generator) @ mixing) * scale


def weights(rows: int, cols: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


def solve(algorithm: Algorithm, weight: Tensor, x: Tensor, fmt: Format) -> Any:
    seen = {cls: cls(x.shape[1], x.device) for cls in algorithm.needs(fmt)}
    for statistic in seen.values():
        statistic.add_batch(x)
        statistic.tokens += len(x)
    return algorithm.solve(weight, algorithm.prepare(seen, fmt), fmt)


def seen_of(x: Tensor) -> Seen:
    hessian = Hessian(x.shape[1], x.device)
    hessian.add_batch(x)
    hessian.tokens += len(x)
    return {Hessian: hessian}


def error(algorithm: Algorithm, weight: Tensor, x: Tensor, fmt: Format) -> float:
    values = fmt.unpack(fmt.pack(solve(algorithm, weight, x, fmt)))
    return relative_error(weight, values, seen_of(x))


@pytest.mark.parametrize("algorithm", SPARSIFIERS, ids=lambda a: a.name)
@pytest.mark.parametrize("values", [Dense(), Integer(4, 32), Integer(3, -1, False)])
def test_every_block_keeps_exactly_n_of_m(algorithm: Algorithm, values: Format) -> None:
    weight, x = weights(8, 256), inputs(600, 256)
    # 38 of every 128 columns are 76 of 256, which no block of 32 codes divides.
    patterns = [p for p in PATTERNS if p != (38, 128) or isinstance(values, Dense)]
    for n, m in patterns:
        fmt = Sparse(n, m, values)
        solution = solve(algorithm, weight, x, fmt)
        assert bool((solution.mask.unflatten(1, (-1, m)).sum(-1) == n).all())
        unpacked = fmt.unpack(fmt.pack(solution))
        assert bool((unpacked[~solution.mask] == 0).all())
        assert bool(unpacked.isfinite().all())


def test_wanda_keeps_the_largest_products_and_changes_none() -> None:
    weight, x = weights(6, 32), inputs(100, 32)
    solution = solve(Wanda(), weight, x, Sparse(2, 4, DENSE))
    for row in range(6):
        for first in range(0, 32, 4):
            products = {
                c: abs(float(weight[row, c])) * float(x[:, c].norm())
                for c in range(first, first + 4)
            }
            best = sorted(products, key=lambda c: products[c])[2:]
            kept = [c for c in products if solution.mask[row, c]]
            assert sorted(best) == kept
    assert torch.equal(Sparse(2, 4, DENSE).compact(weight, solution.mask), solution.values)


def test_magnitude_keeps_the_largest_weights() -> None:
    weight = weights(8, 128)
    solution = Magnitude().solve(weight, None, Sparse(38, 128, DENSE))
    least = torch.where(solution.mask, weight.abs(), torch.inf).amin(1)
    most = torch.where(solution.mask, 0, weight.abs()).amax(1)
    assert bool((least >= most).all())


@pytest.mark.parametrize("clip", [True, False])
def test_sparsegpt_that_keeps_everything_is_gptq(clip: bool) -> None:
    weight, x = weights(32, 128), inputs(800, 128)
    values = Integer(3, 32)
    ours = solve(SparseGPT(clip=clip, sweeps=0), weight, x, Sparse(128, 128, values))
    gptq = solve(GPTQ(clip=clip, sweeps=0), weight, x, values)
    assert torch.equal(ours.values.codes, gptq.codes)
    assert torch.equal(ours.values.scales, gptq.scales)


def test_removing_one_column_leaves_the_least_squares_fit() -> None:
    """Where the first column visited goes, all others can make up for it."""
    weight, x = weights(5, 16), inputs(300, 16)
    hessian = Hessian.of(seen_of(x))
    factor = factorize(hessian, 1e-4, torch.arange(16).roll(-3))
    mask = torch.ones(5, 16, dtype=torch.bool)
    mask[:, 3] = False
    fmt = Sparse(15, 16, DENSE)
    pruning = fmt.rounder(weight, mask=mask)
    error_feedback(weight, factor, pruning)
    values = fmt.matrix(pruning.solution())
    damped = (hessian + 1e-4 * hessian.diagonal().mean() * torch.eye(16)).double()
    kept = [c for c in range(16) if c != 3]
    best = torch.linalg.solve(damped[kept][:, kept], damped[kept] @ weight.double().T).T
    torch.testing.assert_close(values[:, kept].double(), best, rtol=1e-4, atol=1e-5)


def test_sparsegpt_removes_what_later_columns_make_up_for_best() -> None:
    weight, x = weights(20, 8, seed=4), inputs(200, 8, seed=4)
    hessian = Hessian.of(seen_of(x))
    factor = factorize(hessian, 1e-6, torch.arange(8))
    pruning = Sparse(7, 8, DENSE).rounder(weight)
    error_feedback(weight, factor, pruning)
    cost = torch.empty(20, 8, dtype=torch.float64)
    for j in range(8):
        moved = weight.double()[:, j:].clone()
        inverse = torch.linalg.inv(hessian.double()[j:, j:])
        change = moved[:, :1] / inverse[0, 0] * inverse[:1]
        cost[:, j] = ((change @ hessian.double()[j:, j:]) * change).sum(1)
    assert torch.equal((~pruning.solution().mask).int().argmax(1), cost.argmin(1))


@pytest.mark.parametrize(
    "values", [Integer(4, 32), Integer(2, 64, False), Integer(3, -1), Integer(8, 128)]
)
def test_scales_belong_to_kept_columns(values: Integer) -> None:
    """Without correlations the sweep moves nothing, so it must round as the value format does."""
    weight = weights(16, 512)
    factor = factorize(torch.eye(512), 0.01, torch.arange(512))
    for n, m in ((2, 4), (12, 16), (64, 128), (96, 128), (32, 32)):
        fmt = Sparse(n, m, values)
        mask = fmt.select(weight.abs())
        for given in (mask, None):
            pruning = fmt.rounder(weight, mask=given)
            error_feedback(weight, factor, pruning)
            expected = SparseSolution(mask, values.nearest(fmt.compact(weight, mask)))
            found = fmt.pack(pruning.solution())
            for name, tensor in fmt.pack(expected).items():
                assert torch.equal(found[name], tensor)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (64, 128), (38, 128)])
def test_each_method_loses_less_than_the_one_before(n: int, m: int) -> None:
    fmt = Sparse(n, m, DENSE)
    for seed in range(3):
        weight, x = weights(16, 256, seed), inputs(1200, 256, seed)
        found = [error(algorithm, weight, x, fmt) for algorithm in SPARSIFIERS]
        assert found == sorted(found, reverse=True)
        assert found[3] < 0.7 * found[2]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (64, 128)])
def test_choosing_and_rounding_together_beats_rounding_afterwards(
    n: int, m: int, symmetric: bool
) -> None:
    values = Integer(3, 32, symmetric)
    together, plain = Sparse(n, m, values), Sparse(n, m, DENSE)
    for algorithm in (SparseGPT(), ALPS()):
        weight, x = weights(16, 128), inputs(800, 128)
        solution = solve(algorithm, weight, x, plain)
        rounded = SparseSolution(solution.mask, values.nearest(solution.values))
        after = together.unpack(together.pack(rounded))
        assert error(algorithm, weight, x, together) < 0.9 * relative_error(
            weight, after, seen_of(x)
        )


def test_gptq_keeps_the_pattern_of_a_matrix_with_zeros() -> None:
    weight, x = weights(16, 128), inputs(500, 128)
    mask = Sparse(2, 4, DENSE).select(torch.rand(16, 128))
    fmt = Sparse(2, 4, Integer(4, 32))
    solution = solve(GPTQ(), weight * mask, x, fmt)
    assert torch.equal(solution.mask, mask)
    nearest = fmt.unpack(fmt.pack(fmt.nearest(weight * mask)))
    assert error(GPTQ(), weight * mask, x, fmt) < 0.8 * relative_error(
        weight * mask, nearest, seen_of(x)
    )


def test_refitting_reaches_the_least_squares_fit_and_never_loses() -> None:
    weight, x = weights(12, 64), inputs(400, 64)
    scaled = scale_hessian(Hessian.of(seen_of(x)), 0.01, None)
    target = weight * scaled.scale
    mask = Sparse(2, 4, DENSE).select(target.abs())

    def lost(values: Tensor) -> Tensor:
        moved = target - values
        return ((moved @ scaled.hessian) * moved).sum(1)

    start = before = target * mask
    for steps in (1, 2, 5, 10):
        after = refit(target, mask, start, scaled.hessian, steps)
        assert bool((lost(after) <= lost(before) * (1 + 1e-5)).all())
        before = after
    best = torch.zeros_like(target)
    for row in range(12):
        kept = mask[row].nonzero().flatten()
        moved = scaled.hessian[kept] @ target[row]
        best[row, kept] = torch.linalg.solve(scaled.hessian[kept][:, kept], moved)
    found = refit(target, mask, start, scaled.hessian, 100)
    torch.testing.assert_close(found, best, rtol=1e-3, atol=1e-3)
    assert not bool(found[~mask].any())


@pytest.mark.parametrize(
    ("algorithm", "values"),
    [
        *((algorithm, Dense()) for algorithm in SPARSIFIERS),
        *((algorithm, Integer(4, 32)) for algorithm in (*SPARSIFIERS, GPTQ())),
    ],
    ids=lambda value: value.name,
)
def test_zero_rows_and_dead_inputs_do_no_harm(algorithm: Algorithm, values: Format) -> None:
    weight, x = weights(8, 64), inputs(300, 64)
    weight[2] = 0
    x[:, 1::4] = 0
    fmt = Sparse(2, 4, values)
    solution = solve(algorithm, weight, x, fmt)
    unpacked = fmt.unpack(fmt.pack(solution))
    assert bool(unpacked.isfinite().all())
    assert not bool(unpacked[2].any())
    if algorithm.name in ("wanda", "sparsegpt", "alps"):
        assert not bool(solution.mask[torch.arange(8) != 2, 1::4].any())
    nothing = solve(algorithm, weight, torch.zeros(5, 64), fmt)
    if algorithm.name != "alps":
        assert torch.equal(nothing.mask, fmt.select(weight.abs()))
    assert bool(fmt.unpack(fmt.pack(nothing)).isfinite().all())


def test_dead_inputs_are_kept_by_size_where_nothing_else_is_left() -> None:
    squares = InputNorms(8, torch.device("cpu"))
    assert float(Wanda().prepare({InputNorms: squares}, DENSE)[0]) == pytest.approx(NEVER_ACTIVE)


@pytest.mark.parametrize("name", ["magnitude", "wanda", "sparsegpt", "alps"])
def test_a_recipe_that_prunes_into_a_format_without_zeros_is_refused(name: str) -> None:
    recipe = {
        "formats": {"w": {"format": "integer", "bits": 4}},
        "modules": [{"match": "blocks", "format": "w", "algorithm": name}],
    }
    with pytest.raises(RecipeError, match=rf"{name}.*integer.*needs sparse"):
        parse_recipe(recipe, "recipe", "custom")
    sparse = {"format": "sparse", "n": 2, "m": 4, "values": {"format": "dense"}}
    recipe["formats"] = {"w": sparse}
    assert parse_recipe(recipe, "recipe", "custom").modules[0].algorithm.name == name
    if name in ("sparsegpt", "alps"):
        with pytest.raises(RecipeError, match="damping is 0"):
            ALGORITHMS.build({"algorithm": name, "damping": 0}, "algorithm", "here", RecipeError)


def test_gptq_into_dense_values_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"gptq.*sparse.*integer"):
        GPTQ().check_format(Sparse(2, 4, Dense()))
