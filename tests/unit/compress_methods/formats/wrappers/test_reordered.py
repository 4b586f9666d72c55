"""Columns stored in another order mean the same matrix, and are multiplied as it."""

from __future__ import annotations

import pytest
import torch

from compress_methods.errors import FormatError
from compress_methods.formats import Stored, format_from_dict
from compress_methods.formats.integer import Integer
from compress_methods.formats.sparse import Sparse
from compress_methods.formats.wrappers.reordered import ORDER, Reordered, ReorderedSolution
from compress_methods.kernels import Want, embed, matmul, prepare

FORMAT = Reordered(Integer(4, 32, symmetric=False))


@pytest.fixture
def stored() -> Stored:
    torch.manual_seed(0)
    order = torch.randperm(128)
    solution = ReorderedSolution(FORMAT.base.nearest(torch.randn(48, 128)), order)
    return Stored.whole(FORMAT, FORMAT.pack(solution), (48, 128))


def test_values_are_the_base_s_in_their_own_places(stored: Stored) -> None:
    base = FORMAT.base.unpack({n: t for n, t in stored.tensors.items() if n != ORDER})
    assert torch.equal(stored.values()[:, stored.tensors[ORDER].long()], base)
    specs = FORMAT.tensors(48, 128)
    assert {n: tuple(t.shape) for n, t in stored.tensors.items()} == {
        n: spec.shape for n, spec in specs.items()
    }
    assert format_from_dict(FORMAT.to_dict()) == FORMAT


@pytest.mark.parametrize("kernel", ["cpu_exact", "reference"])
def test_products_and_rows_are_those_of_the_values(kernel: str, stored: Stored) -> None:
    x, bias = torch.randn(3, 128), torch.randn(48)
    prepared = prepare(stored, Want(kernel=kernel))
    wanted = x @ stored.values().T + bias
    assert torch.allclose(matmul(x, prepared, bias), wanted, atol=1e-4)
    rows = prepare(stored, Want(embed=True))
    ids = torch.tensor([3, 40])
    assert torch.equal(embed(ids, rows, torch.float32), stored.values()[ids])


def test_rows_can_be_cut_columns_not(stored: Stored) -> None:
    piece = stored.cut(rows=(8, 24))
    assert torch.equal(piece.values(), stored.values()[8:24])
    assert FORMAT.alignment(48, 128)[1] == 128
    with pytest.raises(FormatError, match="cannot cut at"):
        stored.cut(cols=(0, 64))


def test_an_order_that_is_none_and_a_base_that_prunes_are_refused(stored: Stored) -> None:
    tensors = {**stored.tensors, ORDER: torch.zeros(128, dtype=torch.int32)}
    with pytest.raises(FormatError, match="does not name every column once"):
        FORMAT.unpack(tensors)
    with pytest.raises(FormatError, match="base is sparse"):
        Reordered(Sparse(2, 4, Integer(8, -1)))
