"""What is learned of inputs: by definition, once for every input, and what errors it measures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress_methods.algorithms.statistics import (
    Gatherer,
    Hessian,
    InputNorms,
    Statistic,
    relative_error,
)

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


def run(needs: dict[str, Any], *batches: Tensor) -> Gatherer:
    torch.manual_seed(0)
    model, gatherer = Attention(), Gatherer(needs)
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
