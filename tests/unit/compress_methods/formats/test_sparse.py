"""n of every m columns: which are kept, exactly what is stored, what does not fit."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress_methods.errors import FormatError
from compress_methods.formats import Format, format_from_dict
from compress_methods.formats.dense import Dense
from compress_methods.formats.integer import Integer
from compress_methods.formats.sparse import BLOCKS, Sparse, SparseSolution


@st.composite
def sparse_matrices(draw: st.DrawFn) -> tuple[Sparse, torch.Tensor]:
    """Any n of any m of values that are kept exactly, with ties."""
    m = draw(st.sampled_from(BLOCKS))
    fmt = Sparse(draw(st.integers(1, m)), m, Dense("float32"))
    cols = max(m, 8) * draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    weight = torch.randn(draw(st.integers(1, 9)), cols, generator=generator)
    return fmt, (4 * weight).round() if draw(st.booleans()) else weight


@given(sparse_matrices())
def test_sparse_keeps_the_first_largest_n_of_every_m_exactly(
    drawn: tuple[Sparse, torch.Tensor],
) -> None:
    fmt, weight = drawn
    expected = torch.zeros_like(weight)
    for row in range(len(weight)):
        for start in range(0, weight.shape[1], fmt.m):
            block = range(start, start + fmt.m)
            for col in sorted(block, key=lambda c: (-abs(float(weight[row, c])), c))[: fmt.n]:
                expected[row, col] = weight[row, col]
    stored = fmt.pack(fmt.nearest(weight))
    assert torch.equal(fmt.unpack(stored), expected)


@given(sparse_matrices(), st.randoms())
def test_sparse_holds_any_mask_of_n_in_every_m(
    drawn: tuple[Sparse, torch.Tensor], random: Any
) -> None:
    fmt, weight = drawn
    mask = torch.zeros(weight.shape, dtype=torch.bool)
    for row in range(len(weight)):
        for start in range(0, weight.shape[1], fmt.m):
            mask[row, random.sample(range(start, start + fmt.m), fmt.n)] = True
    compacted = fmt.compact(weight, mask)
    assert torch.equal(fmt.compact(fmt.expand(compacted, mask), mask), compacted)
    stored = fmt.pack(SparseSolution(mask, compacted))
    assert torch.equal(fmt.mask(stored), mask)
    assert torch.equal(fmt.unpack(stored), weight * mask)


def test_a_mask_of_another_count_is_refused_by_row_and_columns() -> None:
    fmt = Sparse(2, 4, Dense())
    stored = fmt.pack(fmt.nearest(torch.randn(3, 16)))
    stored["weight_mask"][1, 1] |= 0xF0
    with pytest.raises(FormatError, match="row 1 keeps 4 of columns 12 to 15, expected 2"):
        fmt.unpack(stored)


def test_a_sparse_format_survives_its_json_form() -> None:
    fmt = Sparse(64, 128, Integer(8, -1, activations="int8"))
    assert format_from_dict(json.loads(json.dumps(fmt.to_dict()))) == fmt
    assert fmt.describe() == "64:128 int8 row + int8 activations"


def test_half_of_int8_is_stored_in_5_bits_and_of_bfloat16_in_9() -> None:
    rows, cols = 64, 4096
    for values, bits in ((Integer(8, -1), 5 + 16 / cols), (Dense(), 9), (Integer(4, 128), 3.0625)):
        for m in BLOCKS:
            fmt = Sparse(m // 2, m, values)
            assert 8 * fmt.nbytes(rows, cols) / (rows * cols) == bits


@pytest.mark.parametrize(
    ("fmt", "shape", "words"),
    [
        (Sparse(64, 128, Dense()), (8, 192), "m: 128 does not divide 192 columns"),
        (Sparse(2, 4, Dense()), (8, 12), "m: 8 does not divide 12 columns"),
        (Sparse(3, 8, Integer(8, -1)), (8, 64), "3 of 8 of 64 columns: 24 columns are no multiple"),
    ],
)
def test_columns_that_do_not_fit_are_named(fmt: Format, shape: tuple[int, int], words: str) -> None:
    with pytest.raises(FormatError, match=words):
        fmt.tensors(*shape)
