"""Floats of few bits: which values they are, what they take, how near the nearest one is."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress_methods.errors import FormatError
from compress_methods.formats import Format
from compress_methods.formats.encoding.small_floats import (
    decode_e2m1,
    decode_e4m3,
    decode_e8m0,
    encode_e2m1,
    encode_e4m3,
    encode_e8m0,
    nearest_e4m3,
    nearest_power,
    power_above,
)
from compress_methods.formats.floats import Float
from compress_methods.formats.integer import Integer
from compress_methods.formats.lookup import Lookup
from tests.unit.compress_methods.drawn import floats, matrices

BYTES = torch.arange(256, dtype=torch.uint8)
FINITE = BYTES[(BYTES & 127) != 127]
POWERS = BYTES[1:255]
positive = st.floats(2.0**-120, 2.0**120, width=32)


def random(rows: int = 64, cols: int = 512, seed: int = 0) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


def loss(fmt: Format, weight: Tensor, importance: Tensor | None = None) -> float:
    """Squared error, weighted as the fit is, of what is stored."""
    squares = (fmt.unpack(fmt.pack(fmt.nearest(weight, importance))) - weight).square()
    return float((squares if importance is None else squares * importance).sum())


def test_floats_are_those_of_their_bits() -> None:
    """Sign, exponent, mantissa; the least exponent has no leading one."""
    for codes, exponent, mantissa, decode in (
        (BYTES[:16], 2, 1, decode_e2m1),
        (FINITE, 4, 3, decode_e4m3),
    ):
        bias = 2 ** (exponent - 1) - 1
        for code, value in zip(codes.tolist(), decode(codes).tolist(), strict=True):
            sign = -1 if code >> (exponent + mantissa) else 1
            power, rest = divmod(code % 2 ** (exponent + mantissa), 2**mantissa)
            size = math.ldexp(rest, 1 - bias - mantissa)
            if power:
                size = math.ldexp(2**mantissa + rest, power - bias - mantissa)
            assert value == sign * size
    assert decode_e8m0(BYTES[:255]).tolist() == [2.0 ** (code - 127) for code in range(255)]


def test_codes_of_what_codes_stand_for_are_these() -> None:
    assert torch.equal(decode_e2m1(encode_e2m1(decode_e2m1(BYTES[:16]))), decode_e2m1(BYTES[:16]))
    assert torch.equal(encode_e4m3(decode_e4m3(FINITE)), FINITE)
    assert torch.equal(encode_e8m0(decode_e8m0(POWERS)), POWERS)


@given(positive)
def test_a_power_of_two_is_the_nearest_or_the_least_above(value: float) -> None:
    given = torch.tensor([value])
    powers = decode_e8m0(POWERS).double()
    nearest, above = float(nearest_power(given)), float(power_above(given))
    assert abs(nearest - value) == float((powers - value).abs().min())
    assert above == float(powers[powers >= value].min())
    clipped = float(nearest_e4m3(given))
    stored = decode_e4m3(FINITE).double()
    assert abs(clipped - value) == float((stored[stored > 0] - value).abs().min())


@given(matrices(floats()))
def test_no_other_float_is_nearer_to_a_weight(drawn: tuple[Float, Tensor]) -> None:
    fmt, weight = drawn
    solution = fmt.nearest(weight)
    groups = fmt.groups(weight.shape[1])
    whole = fmt.whole_scales(solution.scales, solution.of_rows, len(weight)).double()
    scales = whole.repeat_interleave(weight.shape[1] // groups, 1)
    values = (decode_e2m1(BYTES[:16]) if fmt.bits == 4 else decode_e4m3(FINITE)).double()
    errors = torch.full_like(scales, torch.inf)
    for value in values.unique().tolist():
        errors = torch.minimum(errors, (value * scales - weight).abs())
    found = (fmt.matrix(solution) - weight).abs().double()
    assert bool((found <= errors * (1 + 1e-5) + weight.abs() * 1e-6).all())
    assert bool((fmt.matrix(solution)[(weight == 0).all(1)] == 0).all())


@given(matrices(floats()))
def test_scales_are_values_that_are_stored_and_reach_every_weight(
    drawn: tuple[Float, Tensor],
) -> None:
    """A rounded scale may leave the largest weight a little beyond the largest float."""
    fmt, weight = drawn
    solution = fmt.nearest(weight)
    again = fmt.solution(fmt.pack(solution))
    assert torch.equal(again.scales, solution.scales)
    assert torch.equal(again.codes, solution.codes)
    whole = fmt.whole_scales(solution.scales, solution.of_rows, len(weight))
    scales = whole.repeat_interleave(weight.shape[1] // whole.shape[1], 1)
    most = 6 if fmt.bits == 4 else 448
    slack = 1.0 if fmt.kind.startswith("mx") else 1 + 2**-4 if fmt.kind == "nvfp4" else 1 + 2**-8
    assert bool((weight.abs() <= most * slack * scales).all())


def test_bits_per_weight_are_floats_and_scales_and_nothing_else() -> None:
    rows, cols = 256, 1024
    for fmt, bits in (
        (Float(), 8 + 32 / cols),
        (Float("fp8", 64), 8 + 16 / 64),
        (Float("fp8", 128, 128), 8 + 32 / 128**2),
        (Float("mxfp8"), 8 + 8 / 32),
        (Float("mxfp4"), 4 + 8 / 32),
        (Float("nvfp4"), 4 + 8 / 16 + 32 / cols),
    ):
        assert 8 * fmt.nbytes(rows, cols) / (rows * cols) == bits


def test_finer_scales_lose_less() -> None:
    weight = random() * random(64, 1, 1).exp()
    importance = random(1, 512, 2)[0].square() + 0.1
    found = [loss(Float(kind), weight, importance) for kind in ("mxfp4", "nvfp4", "mxfp8", "fp8")]
    assert found[1] < 0.65 * found[0]
    assert max(found[2:]) < 0.2 * found[1]
    # A power of two is up to twice what bfloat16 would be.
    assert loss(Lookup(4, 32, "fp4"), weight, importance) < 0.8 * found[0]
    assert loss(Integer(4, 128), weight, importance) > found[1]


def test_the_search_knows_scales_that_make_the_largest_value_four() -> None:
    """Values at 3/4 of the largest lie between 4 and 6, and hit 3 if it is stored as 4."""
    row = torch.tensor([4.0, 3.0, 3.0, 3.0, 2.0, 1.5, 1.0, 0.5] * 2)
    weight = row.repeat(4, 4) / 4
    fmt, ones = Float("nvfp4"), torch.ones(64)
    assert loss(fmt, weight) > 0.01
    assert loss(fmt, weight, ones) == 0


@settings(max_examples=20)
@given(floats(("mxfp4", "nvfp4")), st.integers(0, 99))
def test_importance_lowers_what_it_weighs(fmt: Float, seed: int) -> None:
    weight = random(16, 256, seed)
    importance = random(1, 256, seed + 1)[0].square() ** 2 + 0.01
    plain = (fmt.matrix(fmt.nearest(weight)) - weight).square() * importance
    assert loss(fmt, weight, importance) < float(plain.sum())


def test_scales_of_rows_do_not_depend_on_other_rows_and_are_powers_of_two() -> None:
    """So slabs of a matrix are solved apart, and all rows can be brought to one scale exactly."""
    fmt = Float("nvfp4")
    weight = random() * random(64, 1, 1).exp()
    whole = fmt.pack(fmt.nearest(weight))
    slabs = [fmt.pack(fmt.nearest(slab)) for slab in weight.split(16)]
    for name, tensor in whole.items():
        assert torch.equal(torch.cat([slab[name] for slab in slabs]), tensor)
    of_rows, scales = whole["weight_row_scales"], whole["weight_scales"].float()
    assert torch.equal(nearest_power(of_rows), of_rows)
    moved = scales * (of_rows / of_rows.max())[:, None]
    assert torch.equal(nearest_e4m3(moved), moved)


@pytest.mark.parametrize("fmt", [Float(activations="fp8"), Float("fp8", 128, 128, "fp8")])
def test_activations_are_the_nearest_floats_of_their_token_or_block(fmt: Float) -> None:
    x = random(5, 256) * torch.tensor([[1e-3], [1], [1e3], [0], [1]])
    x[4, :128] *= 1e4
    found = fmt.quantize_activations(x)
    groups = (1 if fmt.group_rows == 1 else 2, -1)
    blocks = x.unflatten(1, groups)
    scale = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-20) / 448
    step = torch.maximum((blocks / scale).abs() / 16, torch.tensor(2.0**-10)) * scale
    assert bool(((found.unflatten(1, groups) - blocks).abs() <= 1.001 * step).all())
    assert not torch.equal(found, x)
    assert Float().quantize_activations(x) is x
    assert fmt.quantize_activations(x.bfloat16()).dtype == torch.bfloat16


def test_columns_that_do_not_fit_are_named() -> None:
    for fmt, cols, words in (
        (Float("nvfp4"), 48, "48 columns are no multiple of 32"),
        (Float("mxfp4"), 40, "group_size 32 does not divide 40 columns"),
        (Float("fp8", 128, 128), 192, "group_size 128 does not divide 192 columns"),
        (Float("mxfp8"), 40, "group_size 32 does not divide 40 columns"),
    ):
        with pytest.raises(FormatError, match=words):
            fmt.tensors(64, cols)
    assert Float().nbytes(3, 7) == 3 * 7 + 4 * 3
