"""Formats and statistics make their tensors where the weights are: on the meta device a tensor of
the CPU among them would be an error."""

from __future__ import annotations

import pytest
import torch

from compress_methods.algorithms import Hessian, InputNorms, Statistic
from compress_methods.formats import Format, Stored
from compress_methods.formats.dense import Dense
from compress_methods.formats.floats import Float
from compress_methods.formats.integer import Integer
from compress_methods.formats.lookup import Lookup
from compress_methods.formats.sparse import Sparse
from compress_methods.formats.wrappers.rotated import Rotated

ROWS, COLS = 16, 256
META = torch.device("meta")
FORMATS = [
    Integer(4, 128),
    Integer(3, 64, symmetric=False),
    Integer(2, 32, symmetric=False, scale_dtype="float16"),
    Integer(8, -1, activations="int8"),
    Dense("float16"),
    Lookup(3, 128),
    Lookup(2, 32, "binary", table_rows=1),
    Lookup(4, -1, "nf4"),
    Float(activations="fp8"),
    Float("fp8", 64),
    Float("mxfp8"),
    Float("mxfp4"),
    Float("nvfp4"),
    Rotated(Integer(4, 128)),
    Rotated(Integer(8, -1, activations="int8"), block=32),
]


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.describe())
def test_stored_tensors_are_unpacked_where_they_are(fmt: Format) -> None:
    tensors = {name: spec.empty().to(META) for name, spec in fmt.tensors(ROWS, COLS).items()}
    unit = fmt.alignment(ROWS, COLS)[0]
    rows = (8, 16) if 8 % unit == 0 else (0, 16)
    piece = Stored.whole(fmt, tensors, (ROWS, COLS)).cut(rows=rows, cols=(128, 256))
    values = piece.values()
    assert (values.device, tuple(values.shape)) == (META, (rows[1] - rows[0], 128))
    assert fmt.quantize_activations(torch.empty(3, COLS, device=META)).device == META


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.describe())
def test_columns_are_rounded_where_they_are(fmt: Format) -> None:
    grid = fmt.inner.grid(fmt.turn(torch.empty(ROWS, COLS, device=META)))
    weight = torch.empty(ROWS, COLS, device=META)
    of_rows = torch.empty(ROWS, dtype=torch.int64, device=META)
    for column in (0, COLS - 1, of_rows):
        codes, values = grid.pick(column, weight[:, 0])
        assert (codes.device, values.device) == (META, META)


def test_sparse_rounders_start_where_the_weights_are() -> None:
    fmt = Sparse(64, 128, Dense("float32"))
    rounder = fmt.rounder(torch.empty(ROWS, COLS, device=META))
    assert rounder.mask.device == META


def test_a_hessian_is_turned_where_it_is() -> None:
    turned = Hessian(COLS, META).turned(Rotated(Integer()))
    assert turned.result().device == META


@pytest.mark.parametrize("statistic", [Hessian, InputNorms])
def test_statistics_gather_where_the_inputs_are(statistic: type[Statistic]) -> None:
    gathered = statistic(COLS, META)
    gathered.add_batch(torch.empty(5, COLS, device=META))
    assert gathered.result().device == META
    assert gathered.moved(torch.empty(ROWS, COLS, device=META)).device == META
