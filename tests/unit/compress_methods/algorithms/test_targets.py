"""What a matrix has to make up for, against least squares."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress_methods.algorithms import Hessian, Seen
from compress_methods.algorithms.error_feedback import ErrorFeedback
from compress_methods.algorithms.gptq import GPTQ
from compress_methods.algorithms.pruning.alps import ALPS
from compress_methods.algorithms.pruning.sparsegpt import SparseGPT
from compress_methods.algorithms.statistics import Drift
from compress_methods.errors import RecipeError
from compress_methods.formats import Format
from compress_methods.formats.dense import Dense
from compress_methods.formats.integer import Integer
from compress_methods.formats.sparse import Sparse
from tests.unit.compress_methods.algorithms.test_algorithms import aimed, correlated

INT3 = Integer(3, 32)
HALF = Sparse(16, 32, Dense("float32"))
CASES: list[tuple[ErrorFeedback, Format]] = [
    (GPTQ(damping=1e-6, correction=1), INT3),
    (SparseGPT(damping=1e-6, correction=1), HALF),
    (ALPS(damping=1e-6, correction=1), HALF),
    (SparseGPT(damping=1e-6, correction=1), Sparse(16, 32, Integer(4, -1))),
]
COLS, ROWS, TOKENS = 64, 48, 1000


def seen_of(original: Tensor, x: Tensor, gap: Tensor | None) -> Seen:
    hessian, drift = Hessian(COLS, x.device), Drift(COLS, x.device)
    for at in range(0, len(x), 300):
        piece = slice(at, at + 300)
        hessian.add_batch(x[piece])
        drift.add_pair(original[piece], x[piece], None if gap is None else gap[piece])
        for statistic in (hessian, drift):
            statistic.tokens += len(x[piece])
    return {Hessian: hessian, Drift: drift}


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A weight, the original's inputs, the result's, and how far its stream has fallen behind."""
    torch.manual_seed(0)
    original = correlated(TOKENS, COLS)
    lost = correlated(TOKENS, COLS, seed=1) * 0.1
    x = original * 0.9 + lost
    gap = 0.1 * torch.randn(TOKENS, ROWS) + x @ torch.randn(COLS, ROWS)
    return torch.randn(ROWS, COLS), original, x, gap


@pytest.mark.parametrize(("algorithm", "fmt"), CASES, ids=str)
@pytest.mark.parametrize("adds_to_a_stream", [False, True])
def test_the_aim_is_the_least_squares_fit_of_the_originals_output(
    algorithm: ErrorFeedback, fmt: Format, adds_to_a_stream: bool
) -> None:
    weight, original, x, gap = inputs()
    seen = seen_of(original, x, gap if adds_to_a_stream else None)
    aim = aimed(algorithm, weight, seen, fmt)
    wanted = original @ weight.T + (gap if adds_to_a_stream else 0)
    expected = torch.linalg.lstsq(x.double(), wanted.double()).solution.T
    torch.testing.assert_close(aim.double(), expected, rtol=2e-2, atol=2e-2)
    assert (aim - weight).norm() > 0.1 * weight.norm()


@pytest.mark.parametrize(("algorithm", "fmt"), CASES, ids=str)
def test_aiming_at_outputs_comes_closer_to_them_than_aiming_at_weights(
    algorithm: ErrorFeedback, fmt: Format
) -> None:
    weight, original, x, gap = inputs()
    seen = seen_of(original, x, gap)
    prepared = algorithm.prepare(seen, fmt)
    wanted = original @ weight.T + gap

    def lost(target: Tensor) -> float:
        found = fmt.matrix(algorithm.solve(target.clone(), prepared, fmt))
        return float((x @ found.T - wanted).square().mean())

    assert lost(aimed(algorithm, weight, seen, fmt)) < 0.9 * lost(weight)


def test_a_part_of_the_correction_is_a_part_of_the_way() -> None:
    weight, original, x, gap = inputs()
    seen = seen_of(original, x, gap)
    whole, half, fitting = GPTQ(correction=1), GPTQ(correction=0.5), GPTQ()
    full = aimed(whole, weight, seen, INT3) - weight
    torch.testing.assert_close(aimed(half, weight, seen, INT3), weight + full / 2)
    part = TOKENS / (TOKENS + 8 * COLS)
    torch.testing.assert_close(aimed(fitting, weight, seen, INT3), weight + full * part)


def test_where_nothing_is_compared_weights_are_the_aim() -> None:
    weight, original, x, gap = inputs()
    seen = seen_of(original, x, gap)
    alone: Seen = {Hessian: seen[Hessian]}
    assert aimed(GPTQ(), weight, alone, INT3) is weight
    assert GPTQ(target="weights").needs(INT3) == (Hessian,)
    assert GPTQ(correction=0).needs(INT3) == (Hessian,)
    assert GPTQ().needs(INT3) == (Hessian, Drift)
    # Zeros that are kept must not be made up for.
    assert GPTQ().needs(Sparse(16, 32, INT3)) == (Hessian,)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": "output"}, "target is 'output', expected outputs or weights"),
        ({"correction": 2}, "correction is 2, expected a number from 0 to 1"),
        ({"sweeps": -1}, "sweeps is -1, expected a number up to 100"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        GPTQ(**settings)  # type: ignore[arg-type]
