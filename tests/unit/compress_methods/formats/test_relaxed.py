"""Solutions that gradients move: what they stand for is always what would be stored."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from compress_methods.errors import FormatError
from compress_methods.formats import Format, format_from_dict
from compress_methods.formats.integer import Integer
from compress_methods.formats.relaxed import Relaxed
from tests.third_party.lookup import Lookup2

INT3 = {"format": "integer", "bits": 3, "group_size": 32}
SPECS: list[dict[str, Any]] = [
    INT3,
    {**INT3, "bits": 2, "symmetric": False},
    {**INT3, "bits": 8, "group_size": -1, "scale_dtype": "float16"},
    {"format": "sparse", "n": 2, "m": 4, "values": INT3},
    {"format": "sparse", "n": 8, "m": 16, "values": {"format": "dense"}},
    {"format": "dense"},
    {"format": "lookup", "bits": 4, "group_size": 64, "table": "nf4"},
    {"format": "lookup", "bits": 3, "group_size": -1, "table_rows": 1},
    {"format": "float", "kind": "fp8", "group_size": 64},
    {"format": "float", "kind": "mxfp4"},
    {"format": "float", "kind": "nvfp4"},
]


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(16, 128, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=SPECS, ids=lambda spec: format_from_dict(spec).describe())
def fmt(request: pytest.FixtureRequest) -> Format:
    return format_from_dict(request.param)


def stored(fmt: Format, relaxed: Relaxed) -> Tensor:
    return fmt.unpack(fmt.pack(relaxed.solution()))


def test_settled_at_once_it_is_the_nearest_solution(fmt: Format, weight: Tensor) -> None:
    solution = fmt.solution(fmt.pack(fmt.nearest(weight)))
    relaxed = fmt.relax(solution, weight)
    assert fmt.relaxes
    relaxed.settle(1.0)
    assert torch.equal(relaxed.matrix(relaxed.parameters), fmt.matrix(solution))
    before, after = fmt.pack(solution), fmt.pack(relaxed.solution())
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_before_it_is_the_weight_as_far_as_the_range_reaches(weight: Tensor) -> None:
    relaxed = Integer(8, 32).relax(Integer(8, 32).nearest(weight), weight)
    assert torch.allclose(relaxed.matrix(relaxed.parameters), weight, atol=0.03)
    relaxed = Integer(2, 32).relax(Integer(2, 32).nearest(weight), weight)
    assert (relaxed.matrix(relaxed.parameters) - weight).abs().max() > 0.03


def test_moved_and_settled_in_turn_a_loss_falls_below_the_nearests(
    fmt: Format, weight: Tensor
) -> None:
    """The loss: the error of the outputs for correlated inputs."""
    mixed = torch.randn(128, 128, generator=torch.Generator().manual_seed(1)) / 8
    aim = 1.05 * weight

    def loss(matrix: Tensor) -> float:
        return float(((matrix - aim) @ mixed).square().mean())

    relaxed = fmt.relax(fmt.nearest(weight), weight)
    before = loss(fmt.unpack(fmt.pack(fmt.nearest(weight))))
    for step in range(60):
        upstream = (relaxed.matrix(relaxed.parameters) - aim) @ mixed @ mixed.T
        found = relaxed.gradients(upstream)
        assert {n: g.shape for n, g in found.items()} == {
            name: value.shape for name, value in relaxed.parameters.items()
        }
        relaxed.move(
            {
                name: 0.05 * relaxed.rates[name] * g / (g.square().mean().sqrt() + 1e-12)
                for name, g in found.items()
            }
        )
        relaxed.settle(min(1.0, step / 50))
    matrix = relaxed.matrix(relaxed.parameters)
    assert torch.equal(matrix, stored(fmt, relaxed))
    assert loss(matrix) < 0.9 * before


def test_what_is_settled_stays_and_what_is_nearest_settles_first(weight: Tensor) -> None:
    fmt = Integer(3, 32)
    relaxed = fmt.relax(fmt.nearest(weight), weight)
    codes = relaxed.parameters["codes"]
    distance = (codes - codes.round()).abs().flatten()
    relaxed.settle(0.25)
    whole = codes == codes.round()
    assert whole.float().mean() == pytest.approx(0.25, abs=0.03)
    assert distance[whole.flatten()].max() <= distance[~whole.flatten()].min()
    before = codes.clone()
    relaxed.move({"codes": torch.full_like(codes, 0.1), "factors": torch.zeros(16, 4)})
    assert torch.equal(codes[whole], before[whole])
    free = ~whole & (before > 0.1)
    assert torch.allclose(codes[free], before[free] - 0.1)


def test_codes_end_where_the_range_does(weight: Tensor) -> None:
    fmt = Integer(2, 32, levels="mid")
    relaxed = fmt.relax(fmt.nearest(weight), weight)
    for far, last in ((-100.0, 3), (100.0, 0)):
        codes = relaxed.parameters["codes"]
        relaxed.move({"codes": torch.full_like(codes, far), "factors": torch.zeros(16, 4)})
        assert torch.equal(relaxed.solution().codes, torch.full_like(weight, last).byte())


def test_zeros_are_whole_from_the_first_settling_on_and_values_stay(weight: Tensor) -> None:
    fmt = Integer(4, 32, symmetric=False)
    relaxed = fmt.relax(fmt.nearest(weight), weight)
    zeros = relaxed.parameters["zeros"]
    nothing = {name: torch.zeros_like(value) for name, value in relaxed.parameters.items()}
    relaxed.move({**nothing, "zeros": torch.full_like(zeros, 0.2)})
    assert not torch.equal(zeros, zeros.round())
    relaxed.settle(0.01)
    assert torch.equal(zeros, zeros.round())
    before = zeros.clone()
    relaxed.move({**nothing, "zeros": torch.full_like(zeros, 1.0)})
    assert torch.equal(zeros, before)


def test_formats_with_nothing_to_move_say_so(weight: Tensor) -> None:
    fmt = Lookup2()
    assert not fmt.relaxes
    with pytest.raises(FormatError, match=f"{fmt.name} has nothing that gradients can move"):
        fmt.relax(fmt.nearest(weight), weight)
