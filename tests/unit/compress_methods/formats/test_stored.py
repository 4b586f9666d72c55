"""Pieces of stored matrices: where they lie in the whole, and what of them is in every piece."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from compress_methods.errors import FormatError
from compress_methods.formats import MAIN_TENSOR, Axis, Format, Stored, TensorSpec
from compress_methods.formats.dense import Dense
from compress_methods.formats.integer import Integer
from tests.unit.compress_methods.drawn import Drawn, matrices, pieces, units


@dataclass(frozen=True)
class Product(Format):
    """Test format: two factors, whole in every piece, as tensor-train cores are."""

    name: ClassVar[str] = "test-product"

    def tensors(self, rows: int, cols: int) -> dict[str, TensorSpec]:
        shapes = {MAIN_TENSOR: (rows, 2), "weight_right": (2, cols)}
        return {name: TensorSpec(shape, "float32") for name, shape in shapes.items()}

    def pack(self, solution: Any) -> dict[str, Tensor]:
        return dict(zip((MAIN_TENSOR, "weight_right"), solution, strict=True))

    def solution(self, tensors: Mapping[str, Tensor]) -> Any:
        return tensors[MAIN_TENSOR], tensors["weight_right"]

    def matrix(self, solution: Any) -> Tensor:
        found: Tensor = solution[0] @ solution[1]
        return found


@dataclass(frozen=True)
class Codebook(Format):
    """Test format: pairs of columns by number in a codebook that all rows share."""

    base: Format
    name: ClassVar[str] = "test-codebook"

    def tensors(self, rows: int, cols: int) -> dict[str, TensorSpec]:
        codes = TensorSpec((rows, cols // 2), "uint8", Axis(0), Axis(1, 2))
        return {MAIN_TENSOR: codes, "weight_book": TensorSpec((16, 2), "float32")}

    def pack(self, solution: Any) -> dict[str, Tensor]:
        return dict(zip((MAIN_TENSOR, "weight_book"), solution, strict=True))

    def solution(self, tensors: Mapping[str, Tensor]) -> Any:
        return tensors[MAIN_TENSOR], tensors["weight_book"]

    def matrix(self, solution: Any) -> Tensor:
        codes, book = solution
        found: Tensor = book[codes.long()].flatten(1)
        return found


def product(rows: int = 6, cols: int = 10) -> Stored:
    tensors = Product().pack((torch.randn(rows, 2), torch.randn(2, cols)))
    return Stored.whole(Product(), tensors, (rows, cols))


def codebook(rows: int = 6, cols: int = 10) -> Stored:
    fmt = Codebook(Dense())
    codes = torch.randint(16, (rows, cols // 2), dtype=torch.uint8)
    return Stored.whole(fmt, fmt.pack((codes, torch.randn(16, 2))), (rows, cols))


@given(matrices(), st.data())
def test_a_piece_of_a_piece_is_found_by_its_place_in_the_whole(
    drawn: Drawn, data: st.DataObject
) -> None:
    fmt, weight = drawn
    shape = (weight.shape[0], weight.shape[1])
    whole = Stored.whole(fmt, fmt.pack(fmt.nearest(weight)), shape)
    values, places = whole.values(), units(fmt, shape)
    assert torch.equal(values, fmt.unpack(whole.tensors))
    piece, rows, cols = whole, (0, shape[0]), (0, shape[1])
    for _ in range(2):
        rows = data.draw(pieces(rows[1] - rows[0], places[0], rows[0]))
        cols = data.draw(pieces(cols[1] - cols[0], places[1], cols[0]))
        piece = piece.cut(rows, cols)
        assert (piece.rows, piece.cols, piece.shape) == (rows, cols, shape)
        assert piece.size == (rows[1] - rows[0], cols[1] - cols[0])
        assert torch.equal(piece.values(), values[slice(*rows), slice(*cols)])
    declared = fmt.tensors(*piece.size)
    assert {n: t.shape for n, t in piece.tensors.items()} == {
        n: s.shape for n, s in declared.items()
    }
    assert [t.data_ptr() for t in piece.ordered] == [piece.tensors[n].data_ptr() for n in declared]


def test_a_cut_of_rows_alone_keeps_the_columns_and_the_other_way_round() -> None:
    fmt, weight = Integer(4, 32), torch.randn(20, 128)
    whole = Stored.whole(fmt, fmt.pack(fmt.nearest(weight)), (20, 128))
    values = whole.values()
    assert torch.equal(whole.cut(rows=(3, 7)).values(), values[3:7])
    assert torch.equal(whole.cut(cols=(32, 96)).values(), values[:, 32:96])
    piece = whole.cut(rows=(3, 17)).cut(cols=(64, 128)).cut(rows=(4, 5))
    assert (piece.rows, piece.cols) == ((4, 5), (64, 128))
    assert torch.equal(piece.values(), values[4:5, 64:])
    assert whole.cut() is whole


@pytest.mark.parametrize(
    ("rows", "cols", "words"),
    [
        (None, (32, 96), r"integer weight_packed: cannot cut at \[32, 96\) of 256.*of 64"),
        (None, (64, 96), r"cannot cut at \[64, 96\) of 256; cuts fall on multiples of 64"),
        ((4, 20), None, r"integer weight_zeros: cannot cut at \[4, 20\) of 20.*multiples of 8"),
        ((0, 12), None, r"integer weight_zeros: cannot cut at \[0, 12\) of 20"),
    ],
)
def test_a_cut_inside_a_unit_is_refused(rows: Any, cols: Any, words: str) -> None:
    fmt = Integer(4, 64, symmetric=False)
    whole = Stored.whole(fmt, fmt.pack(fmt.nearest(torch.randn(20, 256))), (20, 256))
    with pytest.raises(FormatError, match=words):
        whole.cut(rows, cols)


def test_tensors_without_an_axis_are_whole_in_every_piece() -> None:
    whole = product()
    values = whole.values()
    assert not whole.cuts_rows
    assert not whole.cuts_cols
    piece = whole.cut((1, 5), (2, 9)).cut((2, 4), (3, 8))
    assert all(piece.tensors[name] is tensor for name, tensor in whole.tensors.items())
    assert piece.size == (2, 5)
    assert torch.equal(piece.values(), values[2:4, 3:8])


def test_a_codebook_is_in_every_piece_and_its_codes_are_cut() -> None:
    whole = codebook()
    values = whole.values()
    assert whole.cuts_rows
    assert whole.cuts_cols
    piece = whole.cut((1, 5), (2, 8))
    assert piece.tensors["weight_book"] is whole.tensors["weight_book"]
    assert piece.tensors[MAIN_TENSOR].shape == (4, 3)
    assert torch.equal(piece.values(), values[1:5, 2:8])


def test_a_matrix_inside_another_is_the_same_piece_of_it() -> None:
    base, weight = Integer(8, -1), torch.randn(12, 64)
    tensors = {**base.pack(base.nearest(weight)), "weight_more": torch.ones(3)}
    piece = Stored(base, tensors, (12, 64), (0, 12), (0, 64)).cut((4, 8))
    wrapper = Stored(Codebook(base), {**tensors, **piece.tensors}, (12, 64), (4, 8), (0, 64))
    inner = wrapper.nested(base)
    assert set(inner.tensors) == set(base.tensors(12, 64))
    assert (inner.format, inner.rows, inner.cols) == (base, (4, 8), (0, 64))
    assert torch.equal(inner.values(), base.unpack(tensors)[4:8])


def test_a_move_to_a_device_moves_every_tensor() -> None:
    fmt = Integer(4, 32, symmetric=False)
    whole = Stored.whole(fmt, fmt.pack(fmt.nearest(torch.randn(8, 64))), (8, 64))
    moved = whole.to(torch.device("meta"))
    assert (whole.device.type, moved.device.type) == ("cpu", "meta")
    assert {t.device.type for t in moved.tensors.values()} == {"meta"}
    assert moved.size == whole.size
