"""Products and look-ups with trains: pieces of ranks, and memory that does not grow with tables."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress_methods.formats import Stored, tensor_train
from compress_methods.formats.tensor_train import ROWS, TABLE, TensorTrain
from compress_methods.kernels import Want, embed, kernel, matmul, prepare
from compress_methods.kernels.tensor_train import TensorTrainProduct
from tests.unit.compress_methods.drawn import pieces

KINDS = [TensorTrain(5, ROWS), TensorTrain(7, TABLE), TensorTrain(9, TABLE, 2, "float32")]


def stored(fmt: TensorTrain, rows: int, cols: int) -> Stored:
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows))
    return Stored.whole(fmt, fmt.pack(fmt.nearest(weight)), (rows, cols))


@given(st.sampled_from(KINDS), st.sampled_from((1, 2**9, 2**22)), st.data())
def test_a_rank_has_its_rows(fmt: TensorTrain, slab: int, data: st.DataObject) -> None:
    """Whatever they begin with, and however few are made at a time."""
    whole = stored(fmt, 90, 64)
    rows = data.draw(pieces(90, 1))
    piece, expected = whole.cut(rows=rows), whole.values()[slice(*rows)]
    x = torch.randn(3, 64)
    with mock.patch.object(tensor_train, "SLAB_ELEMENTS", slab):
        torch.testing.assert_close(matmul(x, prepare(piece)), x @ expected.T)
    count = len(expected)
    ids = torch.tensor(data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=9)))
    found = embed(ids, prepare(piece, Want(embed=True)), torch.float32)
    torch.testing.assert_close(found, expected[ids], rtol=1e-6, atol=0)
    with pytest.raises(IndexError, match=f"id {count} is none of the {count} rows"):
        embed(torch.tensor([count]), prepare(piece, Want(embed=True)), torch.float32)


@pytest.mark.parametrize("fmt", KINDS, ids=str)
def test_a_table_is_never_unpacked_as_a_whole(
    fmt: TensorTrain, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = stored(fmt, 4096, 64)
    ids, x = torch.arange(0, 4096, 97), torch.randn(2, 64)
    expected = whole.values()
    monkeypatch.setattr(tensor_train, "SLAB_ELEMENTS", 2**13)
    prepared = prepare(whole, Want(embed=True))
    assert prepared.kernel == "tensor_train"
    product = kernel("tensor_train")
    assert isinstance(product, TensorTrainProduct)
    sizes = [len(rows) for rows in product.slabs(whole)]
    assert sum(sizes) == 4096
    monkeypatch.setattr(TensorTrain, "matrix", None if fmt.kind == TABLE else TensorTrain.matrix)
    torch.testing.assert_close(embed(ids, prepared, torch.float32), expected[ids])
    torch.testing.assert_close(matmul(x, prepared), x @ expected.T, atol=1e-4, rtol=1e-4)
    if fmt.kind == TABLE and fmt.modes == 3:
        assert max(sizes) < 4096 / 4
