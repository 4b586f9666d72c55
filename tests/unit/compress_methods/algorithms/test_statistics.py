"""What is learned of inputs: by definition, once for every input, and what errors it measures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress_methods.algorithms.statistics import (
    Drift,
    Gatherer,
    Hessian,
    InputNorms,
    RowGroups,
    Statistic,
    by_rows,
    relative_error,
)
from compress_methods.errors import CalibrationError

CPU = torch.device("cpu")


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_gathering_in_batches_equals_the_definition() -> None:
    x = numbers(200, 24) @ numbers(24, 24, seed=1)
    norms, hessian = InputNorms(24, CPU), Hessian(24, CPU)
    for piece in x.reshape(4, 50, 24):
        for statistic in (norms, hessian):
            statistic.add_batch(piece)
            statistic.tokens += len(piece)
    torch.testing.assert_close(hessian.result(), x.T @ x / 200)
    torch.testing.assert_close(norms.squares, x.square().sum(0))
    assert norms.tokens == 200


def test_the_mean_is_taken_once() -> None:
    hessian = Hessian(3, CPU)
    hessian.add_batch(2 * torch.eye(3))
    hessian.tokens = 3
    first = hessian.result().clone()
    assert torch.equal(hessian.result(), first)
    torch.testing.assert_close(first, 4 / 3 * torch.eye(3))


class Count(Statistic):
    """A statistic of another distribution: columns that were ever positive."""

    made = 0

    def __init__(self, cols: int, device: torch.device) -> None:
        super().__init__(cols, device)
        Count.made += 1
        self.positive = torch.zeros(cols, device=device)
        self.batches = 0

    def add_batch(self, x: Tensor) -> None:
        self.positive += (x > 0).any(0)
        self.batches += 1

    def result(self) -> Tensor:
        return self.positive


class Attention(nn.Module):
    """Three layers that read one input, and one that reads what comes of it."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("q", "k", "v", "o", "never"):
            self.add_module(name, nn.Linear(6, 6, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.o(q * k + v)


def run(
    needs: dict[str, Any], *batches: Tensor, weights: dict[str, Tensor] | None = None
) -> Gatherer:
    torch.manual_seed(0)
    model, gatherer = Attention(), Gatherer(needs, weights)
    for name in gatherer.needs:
        module = model.get_submodule(name)
        module.register_forward_pre_hook(
            lambda module, args, name=name: gatherer.hook(name, module, args)
        )
    with torch.no_grad():
        for x in batches:
            model(x)
    return gatherer


def test_modules_that_read_one_input_share_what_is_gathered_of_it() -> None:
    Count.made = 0
    batches = numbers(2, 5, 6), numbers(3, 5, 6, seed=1)
    everything = dict.fromkeys(("q", "k", "v", "o"), (Count, InputNorms))
    gatherer = run({**everything, "never": (Count,)}, *batches)
    seen = gatherer.seen
    assert set(seen) == {"q", "k", "v", "o"}
    assert Count.made == 2
    for cls in (Count, InputNorms):
        assert seen["q"][cls] is seen["k"][cls] is seen["v"][cls]
        assert seen["o"][cls] is not seen["q"][cls]
        assert seen["q"][cls].tokens == 25
    assert seen["q"][Count].batches == 2
    x = torch.cat([batch.reshape(-1, 6) for batch in batches])
    torch.testing.assert_close(InputNorms.of(seen["v"]), x.square().sum(0))


def test_each_module_is_given_what_it_needs_and_no_more() -> None:
    needs: dict[str, Any] = {"q": (InputNorms,), "k": (Hessian, InputNorms), "v": (), "o": (Count,)}
    gatherer = run(needs, numbers(4, 6))
    kinds = {name: set(found) for name, found in gatherer.seen.items()}
    assert kinds == {"q": {InputNorms}, "k": {Hessian, InputNorms}, "o": {Count}}
    assert gatherer.seen["q"][InputNorms] is gatherer.seen["k"][InputNorms]
    x = numbers(4, 6)
    torch.testing.assert_close(Hessian.of(gatherer.seen["k"]), x.T @ x / 4)
    torch.testing.assert_close(InputNorms.of(gatherer.seen["q"]), x.square().sum(0))


def test_errors_are_of_outputs_as_far_as_inputs_are_known() -> None:
    x = numbers(300, 8) @ numbers(8, 8, seed=1)
    weight, values = numbers(4, 8, seed=2), numbers(4, 8, seed=3)
    norms, hessian = InputNorms(8, CPU), Hessian(8, CPU)
    for statistic in (norms, hessian):
        statistic.add_batch(x)
        statistic.tokens += len(x)

    def share(inputs: Tensor) -> float:
        lost = ((weight - values) @ inputs.T).square().sum()
        return float(lost / (weight @ inputs.T).square().sum())

    assert relative_error(weight, values) == pytest.approx(share(torch.eye(8)), rel=1e-4)
    assert relative_error(weight, values, {Hessian: hessian}) == pytest.approx(share(x), rel=1e-4)
    apart = torch.diag(x.square().sum(0).sqrt())
    found = relative_error(weight, values, {InputNorms: norms})
    assert found == pytest.approx(share(apart), rel=1e-4)
    assert relative_error(weight, values, {Count: Count(8, CPU)}) == relative_error(weight, values)


@pytest.mark.parametrize("first", [Hessian, InputNorms])
def test_of_several_statistics_the_one_of_most_correlations_measures(first: type) -> None:
    x = numbers(300, 8) @ numbers(8, 8, seed=1)
    weight, values = numbers(4, 8, seed=2), numbers(4, 8, seed=3)
    made = {}
    for cls in sorted((Hessian, InputNorms), key=lambda cls: cls is not first):
        made[cls] = cls(8, CPU)
        made[cls].add_batch(x)
        made[cls].tokens += len(x)
    expected = relative_error(weight, values, {Hessian: made[Hessian]})
    assert relative_error(weight, values, made) == expected


def in_groups(cls: type[Statistic], weights: Tensor, *pieces: tuple[Tensor, ...]) -> RowGroups:
    """What is gathered of pieces (x) or (original, x, gap)."""
    made = RowGroups(cls, weights, pieces[0][0].shape[1], CPU)
    for piece in pieces:
        if len(piece) == 1:
            made.add_batch(*piece)
        else:
            made.add_pair(*piece)
        made.tokens += len(piece[0])
    return made


def test_in_every_group_of_rows_tokens_count_by_its_own_weights() -> None:
    x, original, gap = numbers(40, 6), numbers(40, 6, seed=1), numbers(40, 4, seed=2)
    weights = numbers(40, 2, seed=3).square()
    pieces = [
        (original[at : at + 10], x[at : at + 10], gap[at : at + 10]) for at in (0, 10, 20, 30)
    ]
    hessians = in_groups(Hessian, weights, *((piece[1],) for piece in pieces))
    drifts = in_groups(Drift, weights, *pieces)
    weight, seen = numbers(4, 6, seed=4), {Hessian: hessians, Drift: drifts}
    found = by_rows(seen)
    assert len(found) == 2
    for group, mine in enumerate(found):
        rows, weighed = slice(2 * group, 2 * group + 2), weights[:, group, None] * x
        torch.testing.assert_close(Hessian.of(mine), weighed.T @ x / 40)
        drift = mine[Drift]
        assert isinstance(drift, Drift)
        assert drift.tokens == mine[Hessian].tokens == 40
        missing = (original - x) @ weight[rows].T + gap[:, rows]
        torch.testing.assert_close(drift.missing(weight[rows]).products, missing.T @ weighed / 40)
    assert by_rows({Hessian: found[0][Hessian]}) == [{Hessian: found[0][Hessian]}]
    values = numbers(4, 6, seed=5)
    lost = ((x @ (weight - values).T).square() * weights.repeat_interleave(2, 1)).sum()
    energy = ((x @ weight.T).square() * weights.repeat_interleave(2, 1)).sum()
    assert relative_error(weight, values, seen) == pytest.approx(float(lost / energy), rel=1e-4)


def test_more_tokens_than_have_weights_are_refused() -> None:
    with pytest.raises(CalibrationError, match="3 tokens have weights, but more came"):
        in_groups(Hessian, torch.ones(3, 1), (numbers(2, 6),), (numbers(2, 6),))


def test_modules_with_weights_share_nothing() -> None:
    needs = dict.fromkeys(("q", "k", "v"), (Hessian,))
    weights = {name: numbers(8, 2, seed=i).square() for i, name in enumerate(("k", "v"))}
    batches = numbers(1, 5, 6), numbers(1, 3, 6, seed=1)
    seen = run(needs, *batches, weights=weights).seen
    x = torch.cat([batch[0] for batch in batches])
    torch.testing.assert_close(Hessian.of(seen["q"]), x.T @ x / 8)
    for name, mine in weights.items():
        expected = torch.stack([x.T @ (w[:, None] * x) / 8 for w in mine.T])
        torch.testing.assert_close(Hessian.of(seen[name]), expected)
