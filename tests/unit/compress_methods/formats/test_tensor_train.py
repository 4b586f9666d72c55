"""Trains of cores: what they stand for, how near they come, where they are cut."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress_methods.errors import FormatError
from compress_methods.formats.tensor_train import ROWS, TABLE, TensorTrain, fold


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(fmt: TensorTrain, weight: torch.Tensor) -> float:
    found = fmt.unpack(fmt.pack(fmt.nearest(weight)))
    return float((found - weight).square().sum() / weight.square().sum())


@given(st.integers(1, 200_000), st.integers(2, 8))
def test_a_size_is_folded_without_rest(size: int, modes: int) -> None:
    factors = fold(size, modes)
    assert len(factors) == modes
    assert math.prod(factors) == size


def test_sizes_of_vocabularies_and_widths_fold_evenly() -> None:
    assert fold(256, 4) == [4, 4, 4, 4]
    assert fold(4096, 3) == [16, 16, 16]
    assert sorted(fold(768, 4)) == [4, 4, 6, 8]
    assert max(fold(128_256, 3)) == 167  # a prime factor


@pytest.mark.parametrize("kind", [ROWS, TABLE])
@pytest.mark.parametrize("modes", [2, 3, 4])
def test_every_entry_is_the_product_of_its_matrices(kind: str, modes: int) -> None:
    """Written out, entry by entry, as the papers do."""
    fmt, (rows, cols) = TensorTrain(3, kind, modes, "float32"), (24, 36)
    cores = fmt.nearest(random(rows, cols))
    values = fmt.matrix(cores)
    heights, widths = fold(rows, modes), fold(cols, modes)
    for row in range(rows):
        for col in range(cols):
            product, i, j = torch.ones(1, 1), row, col
            for k in reversed(range(modes)):
                i, digit = divmod(i, heights[k])
                j, place = divmod(j, widths[k])
                core = cores[k][row] if kind == ROWS else cores[k][:, digit]
                product = core[:, place] @ product
            assert product.item() == pytest.approx(float(values[row, col]), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("kind", [ROWS, TABLE])
def test_of_a_train_nothing_is_lost(kind: str) -> None:
    """What is a train of that rank comes back; of full rank anything does."""
    shape = (60, 72)
    true = TensorTrain(3, kind, 3, "float32")
    specs = true.tensors(*shape).values()
    weight = true.matrix([random(*spec.shape, seed=i) for i, spec in enumerate(specs)])
    assert error(true, weight) < 1e-10
    assert error(TensorTrain(2, kind, 3, "float32"), weight) > 1e-3
    assert error(TensorTrain(10_000, kind, 3, "float32"), random(*shape)) < 1e-10


@settings(max_examples=20)
@given(st.sampled_from((ROWS, TABLE)), st.integers(2, 4), st.integers(1, 8), st.integers(0, 9))
def test_the_error_is_what_the_unfoldings_lose_at_most(
    kind: str, modes: int, rank: int, seed: int
) -> None:
    """Oseledets' bound, and less with every rank; the best of the first unfolding is no better."""
    weight = random(16, 96, seed=seed) * random(1, 96, seed=seed + 1).exp()
    fmt = TensorTrain(rank, kind, modes, "float32")
    more = TensorTrain(rank + 1, kind, modes, "float32")
    assert error(more, weight) <= error(fmt, weight) * 1.05
    if kind == TABLE or modes > 2:
        return
    # Two axes: the plain SVD of every row.
    left = torch.linalg.svdvals(weight.unflatten(1, fold(96, 2)))[:, rank:]
    best = float(left.square().sum() / weight.square().sum())
    assert error(fmt, weight) == pytest.approx(best, rel=1e-3, abs=1e-9)


def test_rounded_cores_are_made_up_for_by_those_behind_them() -> None:
    """Full ranks, so that rounding is all that is lost; twice as much where nothing makes up."""
    weight = random(64, 256)
    assert error(TensorTrain(256, ROWS, 3), weight) < 8e-6
    assert error(TensorTrain(10_000, TABLE, 3), weight) < 8e-6
    narrow = TensorTrain(4, ROWS, 3, "float16")
    cores = narrow.nearest(weight * 1e8)
    with pytest.raises(FormatError, match="a value does not fit float16; use dtype: bfloat16"):
        narrow.pack(cores)


def test_bytes_are_those_of_the_cores() -> None:
    assert TensorTrain(2, ROWS, 4).nbytes(4096, 256) == 4096 * (8 + 16 + 16 + 8) * 2
    table = TensorTrain(64, TABLE, 3, "float32")
    assert table.nbytes(4096, 256) == 4 * 16 * (8 * 64 + 64 * 8 * 64 + 64 * 4)


def test_rows_are_cut_and_a_table_is_whole_everywhere() -> None:
    specs = {kind: TensorTrain(4, kind).tensors(64, 96).values() for kind in (ROWS, TABLE)}
    assert all(spec.rows_axis and not spec.cols_axis for spec in specs[ROWS])
    assert not any(spec.rows_axis or spec.cols_axis for spec in specs[TABLE])
