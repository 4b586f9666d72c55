"""Grouped integers: how far values move, what they take, where they can be cut."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given

from compress_methods.errors import FormatError
from compress_methods.formats.integer import Integer
from tests.unit.compress_methods.drawn import integers, matrices


@given(matrices(integers()))
def test_no_value_is_further_than_its_step_allows(drawn: tuple[Integer, torch.Tensor]) -> None:
    fmt, weight = drawn
    solution = fmt.nearest(weight)
    values = fmt.unpack(fmt.pack(solution))
    steps = solution.scales.float().repeat_interleave(
        weight.shape[1] // fmt.groups(weight.shape[1]), 1
    )
    # Half a step, another half where zero points are rounded too; at the ends of the range, what
    # rounding the scale to bfloat16 (one part in 2^9) took off it.
    bound = steps * (1 + 2.0 ** (fmt.bits - 9))
    assert bool(((values - weight).abs() <= bound).logical_or(weight == 0).all())
    assert bool((values[(weight == 0).all(1)] == 0).all())


def test_bits_per_weight_are_bits_plus_scales_and_nothing_else() -> None:
    rows, cols = 256, 1024
    for bits in (2, 3, 4, 5, 6, 8):
        plain, zeros = Integer(bits, 128, True), Integer(bits, 128, False)
        assert 8 * plain.nbytes(rows, cols) / (rows * cols) == bits + 16 / 128
        assert 8 * zeros.nbytes(rows, cols) / (rows * cols) == bits + (16 + bits) / 128


def test_a_cut_between_units_is_refused() -> None:
    fmt = Integer(4, 128)
    stored = fmt.pack(fmt.nearest(torch.randn(8, 256)))
    with pytest.raises(FormatError, match="multiples of 128"):
        fmt.slice(stored, (8, 256), cols=(0, 64))


def test_infinite_scales_of_float16_are_refused() -> None:
    fmt = Integer(4, 32, scale_dtype="float16")
    with pytest.raises(FormatError, match="bfloat16"):
        fmt.pack(fmt.nearest(torch.full((1, 32), 1e9)))
    assert math.isfinite(
        float(
            Integer(4, 32).pack(Integer(4, 32).nearest(torch.full((1, 32), 1e9)))["weight_scales"]
        )
    )
