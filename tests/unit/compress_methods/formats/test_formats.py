"""Formats against their own declaration."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress_methods.errors import FormatError
from compress_methods.formats import FORMATS, Format, dtype_name, format_from_dict
from compress_methods.formats.dense import Dense
from compress_methods.formats.floats import Float
from compress_methods.formats.integer import Integer
from compress_methods.formats.lookup import Lookup
from compress_methods.formats.sparse import Sparse
from compress_methods.formats.wrappers.lowrank import LowRank
from compress_methods.formats.wrappers.rotated import Rotated
from tests.unit.compress_methods.drawn import Drawn, columnwise, formats, matrices, pieces, units


@given(matrices())
def test_stored_tensors_are_exactly_what_is_declared(drawn: Drawn) -> None:
    fmt, weight = drawn
    stored = fmt.pack(fmt.nearest(weight))
    declared = fmt.tensors(*weight.shape)
    found = {name: (tuple(t.shape), dtype_name(t.dtype)) for name, t in stored.items()}
    assert found == {name: (spec.shape, spec.dtype) for name, spec in declared.items()}
    assert fmt.nbytes(*weight.shape) == sum(t.numel() * t.element_size() for t in stored.values())
    for name, spec in declared.items():
        empty = spec.empty()
        assert (tuple(empty.shape), empty.dtype) == (stored[name].shape, stored[name].dtype)


@given(matrices(), st.data())
def test_a_slice_of_the_stored_form_is_the_slice_of_the_matrix(
    drawn: Drawn, data: st.DataObject
) -> None:
    fmt, weight = drawn
    shape = (weight.shape[0], weight.shape[1])
    stored = fmt.pack(fmt.nearest(weight))
    whole = fmt.unpack(stored)
    rows, cols = (
        data.draw(pieces(size, unit)) for size, unit in zip(shape, units(fmt, shape), strict=True)
    )
    sliced = fmt.slice(stored, shape, rows=rows, cols=cols)
    expected = fmt.tensors(rows[1] - rows[0], cols[1] - cols[0])
    assert {n: tuple(t.shape) for n, t in sliced.items()} == {
        n: s.shape for n, s in expected.items()
    }
    found = fmt.unpack(sliced)
    torch.testing.assert_close(found, whole[slice(*rows), slice(*cols)], rtol=0, atol=0)


@given(matrices(columnwise()))
def test_what_a_rounder_picks_column_by_column_is_the_nearest(drawn: Drawn) -> None:
    """Weights that no pass moves are rounded as `nearest` rounds them all at once."""
    fmt, weight = drawn
    expected = fmt.pack(fmt.nearest(weight))
    fmt, weight = fmt.inner, fmt.turn(weight)
    mask = fmt.select(weight.abs()) if fmt.prunes else None
    rounder, picked = fmt.rounder(weight, mask=mask), torch.empty_like(weight)
    for first in range(0, weight.shape[1], rounder.span):
        columns = torch.arange(first, first + rounder.span)
        rounder.begin(columns, weight.T[columns], torch.ones(rounder.span, 1))
        for column in columns.tolist():
            picked[:, column] = rounder.pick(column, weight[:, column])
    solution = rounder.solution()
    assert all(torch.equal(t, expected[name]) for name, t in fmt.pack(solution).items())
    torch.testing.assert_close(picked, fmt.matrix(solution), rtol=0, atol=0)


@given(formats())
def test_the_json_form_is_the_format(fmt: Format) -> None:
    assert format_from_dict(fmt.to_dict()) == fmt


def test_what_a_format_says_of_itself() -> None:
    """Algorithms ask for these, never for what kind of format it is."""
    int4, bf16 = Integer(4, 128), Dense()
    turned = Rotated(int4)
    kinds = (int4, bf16, Sparse(2, 4, int4), Sparse(2, 4, bf16), turned, LowRank(8, int4))
    assert [fmt.rounds for fmt in kinds] == [True, False, True, False, True, False]
    assert [fmt.searches_range for fmt in kinds] == [True, False, True, False, True, True]
    assert [fmt.prunes for fmt in kinds] == [False, False, True, True, False, False]
    assert [fmt.span for fmt in kinds] == [1, 1, 4, 4, 1, 1]
    assert [fmt.sparsity for fmt in kinds] == [0, 0, 0.5, 0.5, 0, 0]
    assert [fmt.inner for fmt in kinds] == [*kinds[:4], int4, kinds[5]]
    plain = Dense("float32")
    pruned = Sparse(2, 4, plain)
    assert [fmt.unrounded() for fmt in kinds] == [plain, plain, pruned, pruned, plain, plain]
    tables = (Lookup(3), Lookup(table="nf4"), Rotated(Lookup(2, table="binary")))
    assert [fmt.learns_values for fmt in (*kinds, *tables)] == [*[False] * 6, True, False, True]
    assert [fmt.holds_zero for fmt in tables] == [False, True, False]
    kinds = tuple(map(Float, ("fp8", "mxfp8", "mxfp4", "nvfp4")))
    assert [fmt.searches_range for fmt in kinds] == [False, False, True, True]
    assert [fmt.bits for fmt in kinds] == [8, 8, 4, 4]
    assert [fmt.group_size for fmt in kinds] == [-1, 32, 32, 16]
    assert all(fmt.rounds and fmt.holds_zero and fmt.relaxes for fmt in kinds)
    assert {"integer", "dense", "lookup", "sparse", "rotated", "lowrank", "float"} <= set(FORMATS)
    assert {"tensor_train", "trellis"} <= set(FORMATS)


INT8 = {"format": "integer", "bits": 8, "group_size": -1}
SPARSE8 = {"format": "sparse", "n": 2, "m": 4, "values": INT8}
MXFP4 = {"format": "float", "kind": "mxfp4"}
TURNED = {"format": "rotated", "base": INT8}
TRAIN = {"format": "tensor_train", "rank": 4}
FEW = {"format": "lowrank", "rank": 8, "base": INT8}


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"format": "intger"}, ["unknown format 'intger'", "did you mean 'integer'?"]),
        ({"format": "integer", "bit": 4}, ["unknown key 'bit'", "did you mean 'bits'?"]),
        ({"format": "integer", "bits": 7}, ["bits is 7", "2, 3, 4, 5, 6, 8"]),
        ({"format": "integer", "bits": "4"}, ["bits is '4'", "expected int"]),
        ({"format": "integer", "bits": True}, ["bits is True"]),
        ({"format": "integer", "group_size": 100}, ["group_size is 100", "-1, 32, 64, 128"]),
        ({"format": "integer", "activations": "fp8"}, ["activations is 'fp8'"]),
        ({"bits": 4}, ["'format'"]),
        ({"format": "lookup", "bits": 8}, ["bits is 8", "2, 3, 4"]),
        ({"format": "lookup", "table": "nf3"}, ["table is 'nf3'", "learned, binary, nf4, fp4"]),
        ({"format": "lookup", "bits": 3, "table": "fp4"}, ["bits is 3", "expected 4 for fp4"]),
        ({"format": "lookup", "table_rows": 8}, ["table_rows is 8", "1, 16, 32, 64, 128"]),
        ({"format": "float", "kind": "fp4"}, ["kind is 'fp4'", "fp8, mxfp8, mxfp4, nvfp4"]),
        ({"format": "float", "group_size": 16}, ["group_size is 16", "-1, 32, 64, 128"]),
        ({"format": "float", "group_rows": 128}, ["group_size is -1", "one of 128"]),
        ({"format": "float", "group_rows": 64}, ["group_rows is 64", "one of 1, 128"]),
        ({**MXFP4, "group_size": 64}, ["group_size is 64", "expected one of 32"]),
        ({**MXFP4, "group_rows": 128}, ["group_rows is 128", "expected one of 1"]),
        ({**MXFP4, "activations": "fp8"}, ["activations is 'fp8'", "expected one of None"]),
        ({"format": "float", "bits": 4}, ["unknown key 'bits'"]),
        ({"format": "sparse", "n": 5, "m": 4, "values": INT8}, ["n is 5", "1 to 4"]),
        ({"format": "sparse", "n": 2, "m": 6, "values": INT8}, ["m is 6", "4, 8, 16, 32, 64"]),
        ({"format": "sparse", "n": 2, "values": INT8}, ["missing key 'm'"]),
        ({"format": "sparse", "n": 2, "m": 4, "values": "int8"}, ["format.values: expected a map"]),
        (
            {"format": "sparse", "n": 2, "m": 4, "values": {"format": "integer", "bit": 8}},
            ["format.values: unknown key 'bit'", "did you mean 'bits'?"],
        ),
        (
            {"format": "sparse", "n": 2, "m": 4, "values": {"format": "integer", "bits": 9}},
            ["format.values: bits is 9"],
        ),
        ({"format": "sparse", "n": 2, "m": 4, "values": SPARSE8}, ["values is sparse itself"]),
        ({"format": "sparse", "n": 2, "m": 4, "values": TURNED}, ["values is rotated"]),
        ({"format": "rotated"}, ["missing key 'base'"]),
        ({**TURNED, "block": 96}, ["block is 96", "32, 64, 128, 256, 512"]),
        ({**TURNED, "base": {"format": "dense"}}, ["base is dense", "one that rounds"]),
        ({**TURNED, "base": SPARSE8}, ["base is sparse", "one that rounds"]),
        ({**TURNED, "base": TURNED}, ["base is rotated itself"]),
        ({**TURNED, "base": {"format": "integer", "bit": 8}}, ["format.base: unknown key 'bit'"]),
        ({"format": "lowrank"}, ["missing key 'rank'"]),
        ({**FEW, "rank": 0}, ["rank is 0", "at least 1"]),
        ({**FEW, "base": {"format": "dense"}}, ["base is dense", "loses something"]),
        ({**FEW, "base": FEW}, ["base is lowrank", "loses something"]),
        ({**FEW, "base": "int8"}, ["format.base: expected a map"]),
        ({**FEW, "factors": INT8}, ["factors of rank 8: 8 columns are no multiple of 32"]),
        ({**FEW, "factors": SPARSE8}, ["factors is 2:4 int8 row", "dense or integer"]),
        ({**FEW, "factors": {**INT8, "activations": "int8"}}, ["without activations"]),
        ({**SPARSE8, "values": FEW}, ["values is int8 row + rank 8", "that holds 0"]),
        ({"format": "tensor_train"}, ["missing key 'rank'"]),
        ({**TRAIN, "rank": 0}, ["rank is 0", "at least 1"]),
        ({**TRAIN, "kind": "row"}, ["kind is 'row'", "rows or table"]),
        ({**TRAIN, "modes": 1}, ["modes is 1", "2 to 8"]),
        ({**TRAIN, "dtype": "int8"}, ["dtype is 'int8'", "bfloat16, float16, float32"]),
        ({**TURNED, "base": TRAIN}, ["base is tensor_train", "one that rounds"]),
        ({**TURNED, "base": FEW}, ["base is lowrank", "one that rounds"]),
    ],
)
def test_bad_parameters_name_the_key(spec: dict[str, object], words: list[str]) -> None:
    with pytest.raises(FormatError) as caught:
        format_from_dict(spec)
    assert all(word in str(caught.value) for word in words)
    assert "\n" not in str(caught.value)
