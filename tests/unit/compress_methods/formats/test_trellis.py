"""Trellises: what paths cost, what windows mean, what error-feedback passes make of them."""

from __future__ import annotations

import itertools

import pytest
import torch

from compress_methods.algorithms.error_feedback import activity_order, error_feedback, factorize
from compress_methods.errors import FormatError
from compress_methods.formats.fitting.viterbi import encode_in_torch
from compress_methods.formats.integer import Integer
from compress_methods.formats.trellis import (
    MIDDLE,
    PLACES,
    SPREAD,
    Trellis,
    TrellisSolution,
    from_sequences,
    to_sequences,
)


def random(rows: int = 64, cols: int = 256, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


def windows(codes: list[int], bits: int, state_bits: int) -> list[int]:
    """By the docstring: a place's own bits, then those of the places that follow."""
    places = range(-(-state_bits // bits))
    return [
        sum(codes[(at + i) % len(codes)] << bits * i for i in places) % 2**state_bits
        for at in range(len(codes))
    ]


@pytest.mark.parametrize(("bits", "state_bits", "places"), [(2, 4, 5), (3, 4, 3), (2, 3, 6)])
def test_no_path_is_cheaper(bits: int, state_bits: int, places: int) -> None:
    """Every path there is, tried. The seam is decided first, so a few are missed by a little."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2**state_bits, generator=generator)
    targets = torch.randn(12, places, generator=generator)
    weights = torch.rand(12, places, generator=generator)
    found = encode_in_torch(targets, weights, values, bits)
    paths = torch.tensor(
        [
            windows(list(c), bits, state_bits)
            for c in itertools.product(range(2**bits), repeat=places)
        ]
    )
    costs = ((targets[:, None] - values[paths]).square() * weights[:, None]).sum(-1)
    mine = torch.tensor([windows(row, bits, state_bits) for row in found.tolist()])
    cost = ((targets - values[mine]).square() * weights).sum(-1)
    least = costs.amin(1)
    assert bool((cost >= least - 1e-6).all())
    assert int((cost <= least + 1e-6).sum()) >= 8
    assert float(cost.sum()) < 1.25 * float(least.sum())
    assert float(cost.sum()) < 0.3 * float(costs.mean(1).sum())


@pytest.mark.parametrize("state_bits", [8, 13, 16])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_values_are_those_of_the_stored_bits(bits: int, state_bits: int) -> None:
    """Read bit by bit from the bytes of a tile, as the docstring says."""
    fmt = Trellis(bits, state_bits)
    packed = torch.randint(0, 256, (1, 2 * PLACES * bits // 8), dtype=torch.uint8)
    tensors = {"weight_packed": packed, "weight_scales": torch.ones(16, 1, dtype=torch.bfloat16)}
    values = fmt.unpack(tensors)
    columns = (0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15)
    for tile in range(2):
        data = packed[0, tile * 32 * bits : (tile + 1) * 32 * bits].tolist()
        stream = int.from_bytes(bytes(data), "little")
        stream |= stream << PLACES * bits
        for place in range(PLACES):
            window = stream >> bits * place & 2**state_bits - 1
            digits = [int(c, 16) for c in f"{(25173 * window + 13849) % 65536:04x}"]
            value = 2 * (digits[2] + digits[3]) + 3 * (digits[0] + digits[1]) - MIDDLE
            assert values[place // 16, 16 * tile + columns[place % 16]] == value


def test_sequences_are_a_permutation_of_tiles() -> None:
    x = torch.arange(32 * 48).reshape(32, 48)
    sequences = to_sequences(x)
    assert torch.equal(from_sequences(sequences, 32, 48), x)
    tile = {int(v) for v in x[16:, 32:].flatten()}
    assert {int(v) for v in sequences[-1]} == tile


@pytest.mark.parametrize(("bits", "limit"), [(2, 0.0795), (3, 0.0220), (4, 0.0066)])
def test_normal_weights_lose_what_the_docstring_says(bits: int, limit: float) -> None:
    """At 2^10 states; single codes lose .118, .0345 and .0095 at best (Max, 1960)."""
    weight = random(256, 512)
    fmt = Trellis(bits, 10)
    error = (fmt.matrix(fmt.nearest(weight)) - weight).square().mean()
    assert float(error) < limit
    values = fmt.values(weight)
    assert abs(float(values.mean())) < 1.5
    assert abs(float(values.std()) / SPREAD - 1) < 0.05


def test_more_states_lose_less() -> None:
    weight = random(64, 256)
    errors = [
        float((fmt.matrix(fmt.nearest(weight)) - weight).square().mean())
        for fmt in (Trellis(2, 8), Trellis(2, 10), Trellis(2, 12))
    ]
    assert errors == sorted(errors, reverse=True)


def test_zeros_stay_and_importance_counts() -> None:
    weight = random(32, 64)
    weight[3] = 0
    fmt = Trellis(2, 8)
    assert bool((fmt.matrix(fmt.nearest(weight))[3] == 0).all())
    importance = random(1, 64, 1)[0].square() ** 2 + 0.01
    plain, weighted = (
        ((fmt.matrix(fmt.nearest(weight, by)) - weight).square() * importance).sum()
        for by in (None, importance)
    )
    assert float(weighted) < float(plain)


def test_an_error_feedback_pass_loses_less_than_the_nearest_path() -> None:
    """On inputs that go together; with errors handed on, far less than integers at that."""
    mix = random(256, 256, 1) @ torch.diag(torch.logspace(0, -2, 256)) @ random(256, 256, 2)
    inputs = random(2048, 256, 3) @ mix
    weight, hessian = random(48, 256), inputs.T @ inputs / len(inputs)

    def loss(solution: TrellisSolution, fmt: Trellis) -> float:
        missed = fmt.matrix(solution) - weight
        return float(((missed @ hessian) * missed).sum())

    fmt = Trellis(2, 9)
    factor = factorize(hessian, 0.01, activity_order(hessian.diagonal(), fmt.span))
    rounder = fmt.rounder(weight)
    error_feedback(weight, factor, rounder)
    fed, nearest = loss(rounder.solution(), fmt), loss(fmt.nearest(weight), fmt)
    refitted = loss(fmt.refit(rounder.solution(), weight, hessian), fmt)
    assert fed < 0.8 * nearest
    assert refitted < fed
    plain = Integer(2, 128, levels="mid")
    rounder = plain.rounder(weight)
    error_feedback(weight, factorize(hessian, 0.01, activity_order(hessian.diagonal())), rounder)
    missed = plain.matrix(rounder.solution()) - weight
    assert fed < 0.8 * float(((missed @ hessian) * missed).sum())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"bits": 5}, "bits is 5, expected one of 2, 3, 4"),
        ({"state_bits": 17}, "state_bits is 17, expected one of 8, 9"),
        ({"group_size": 48}, "group_size is 48, expected one of -1, 32, 64, 128"),
    ],
)
def test_unknown_settings_are_refused(settings: dict[str, int], said: str) -> None:
    with pytest.raises(FormatError, match=said):
        Trellis(**settings)


def test_columns_that_fill_no_tile_are_refused() -> None:
    with pytest.raises(FormatError, match="40 columns are no multiple of 16"):
        Trellis().tensors(16, 40)
