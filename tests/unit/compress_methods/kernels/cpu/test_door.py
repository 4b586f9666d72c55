"""Kernels read no memory but that of the matrix they are given: what does not fit is refused at the
door, in one line, and sizes of zero are sizes like others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from compress_methods.formats import Format, Stored
from compress_methods.formats.floats import Float
from compress_methods.formats.integer import Integer
from compress_methods.formats.lookup import Lookup
from compress_methods.formats.sparse import Sparse
from compress_methods.formats.trellis import Trellis
from compress_methods.kernels import Prepared, Want, composite, dispatch
from compress_methods.kernels.cpu import gemm as cpu_gemm
from compress_methods.kernels.cpu.library import Kind, Library, Mode, Packed

ROWS, COLS = 32, 256
SPARSE = Sparse(64, 128, Integer(8, -1))
NF4, BNB = Lookup(4, 128, "nf4"), Lookup(4, 128, "bnb_nf4")
TRELLIS = Trellis(2, 8)
NVFP4, FP8, BLOCKS = Float("nvfp4"), Float("fp8"), Float("fp8", 128, 128)


def stored(fmt: Format, rows: int = ROWS, cols: int = COLS) -> Stored:
    torch.manual_seed(0)
    return Stored.whole(fmt, fmt.pack(fmt.nearest(torch.randn(rows, cols))), (rows, cols))


def packed(fmt: Format) -> Packed:
    kernel = "cpu_exact" if isinstance(fmt, Float) or fmt == BNB else "cpu"
    return cpu_gemm._packed(dispatch.prepare(stored(fmt), Want(kernel=kernel, embed=True)))


@pytest.mark.parametrize("bad", [32, 40, -1, 2**40])
@pytest.mark.parametrize(
    "fmt", [Integer(4, 128), Integer(8, -1), NF4, SPARSE, NVFP4, TRELLIS], ids=str
)
@pytest.mark.parametrize("name", ["cpu", "cpu_exact", "torch_int8", "reference"])
def test_no_row_is_looked_up_that_the_matrix_has_not(
    isa: Library, name: str, fmt: Format, bad: int
) -> None:
    prepared = dispatch.prepare(stored(fmt), Want(kernel=name, embed=True))
    if name == "torch_int8" and fmt != Integer(8, -1):
        name = "cpu"  # which takes what torch's cannot
    assert prepared.kernel == name
    for ids in ([bad], [3, bad], [bad, *range(31)]):
        with pytest.raises((IndexError, RuntimeError), match=f"id {bad} is none of the 32 rows"):
            dispatch.embed(torch.tensor(ids), prepared, torch.float32)
    last = dispatch.embed(torch.tensor([31, 0]), prepared, torch.float32)
    assert torch.equal(last, stored(fmt).values()[[31, 0]])


def test_rows_of_zeros_are_counted_too() -> None:
    zeros = Prepared(composite.ZEROS, 4, COLS)
    assert not dispatch.embed(torch.tensor([3]), zeros, torch.float32).any()
    with pytest.raises(IndexError, match="id 4 is none of the 4 rows"):
        dispatch.embed(torch.tensor([4]), zeros, torch.float32)


WRONG: list[tuple[str, Format, Callable[[Packed], dict[str, Any]]]] = [
    ("weights are not uint8", Integer(4, 128), lambda m: {"weights": m.weights.char()}),
    ("weights have 2 dim", Integer(4, 128), lambda m: {"weights": m.weights.flatten(1)}),
    ("weights are not contig", Integer(4, 128), lambda m: {"weights": m.weights[:, :, ::2]}),
    ("lines of .* bytes, not", Integer(4, 128), lambda m: {"bits": 8}),
    ("lines of .* bytes, not", Integer(4, 128), lambda m: {"bits": 3}),
    ("weights of 7 bits", Integer(4, 128), lambda m: {"bits": 7}),
    ("weights of 16 bits", Integer(4, 128), lambda m: {"bits": 16}),
    ("80 rows in", Integer(4, 128), lambda m: {"rows": 80}),
    ("a matrix of -16", Integer(4, 128), lambda m: {"rows": -16}),
    ("2 groups of 64", Integer(4, 128), lambda m: {"group": 64}),
    ("2 groups of 0", Integer(4, 128), lambda m: {"group": 0}),
    ("groups of 48", Integer(4, 128), lambda m: {"group": 48}),
    ("groups of -1", Integer(4, 128), lambda m: {"group": -1}),
    ("scales are neither", Integer(4, 128), lambda m: {"scales": m.scales.double()}),
    ("scales are not those", Integer(4, 128), lambda m: {"scales": m.scales[:1]}),
    ("1 groups of 128", Integer(4, 128), lambda m: {"scales": m.scales[:, :1].contiguous()}),
    ("scales are not contig", Integer(4, 128), lambda m: {"scales": _gaps(m.scales)}),
    ("scales have 1 dim", Integer(4, 128), lambda m: {"scales": m.scales.flatten()}),
    ("zeros are not uint8", Integer(4, 128, False), lambda m: {"zeros": m.zeros.char()}),
    ("zeros are not those", Integer(4, 128, False), lambda m: {"zeros": m.zeros[:1]}),
    ("zeros are not contig", Integer(4, 128, False), lambda m: {"zeros": _gaps(m.zeros)}),
    ("weights of 2 bits in a sparse", SPARSE, lambda m: {"bits": 2}),
    ("sparse lines of", SPARSE, lambda m: {"weights": m.weights[:, :, :16].contiguous()}),
    ("values of 16 bits have neither", SPARSE, lambda m: {"bits": 16}),
    ("a sparse matrix, or .* has no zeros", SPARSE, lambda m: {"zeros": m.weights}),
    ("a matrix of kind 7", Integer(4, 128), lambda m: {"kind": 7}),
    ("kind 6 has no values", Integer(4, 128), lambda m: {"kind": Kind.VALUES}),
    ("values have 2 dim", BNB, lambda m: {"zeros": m.zeros[None]}),
    ("values are not 16 float32", BNB, lambda m: {"zeros": m.zeros.double()}),
    ("values are not 16 float32", BNB, lambda m: {"zeros": m.zeros[:8]}),
    ("values are not 16 float32", BNB, lambda m: {"bits": 8}),
    ("windows of 0 bits", Integer(4, 128), lambda m: {"kind": Kind.TRELLIS}),
    ("windows of 12 bits", Integer(4, 128), lambda m: {"kind": Kind.WHOLE | 12 << 8}),
    ("windows of 17 bits", TRELLIS, lambda m: {"kind": Kind.TRELLIS | 17 << 8}),
    ("80 rows in", TRELLIS, lambda m: {"rows": 80}),
    ("has no zeros", TRELLIS, lambda m: {"zeros": m.weights}),
    ("row scales are not float32", NVFP4, lambda m: {"zeros": m.zeros.double()}),
    ("row scales have 2 dim", NVFP4, lambda m: {"zeros": m.zeros[None]}),
    ("31 row scales of 32 rows", NVFP4, lambda m: {"zeros": m.zeros[:31]}),
    ("scales are neither", NVFP4, lambda m: {"scales": m.scales.view(torch.int8)}),
    ("scales are neither", Integer(4, 128), lambda m: {"scales": m.scales.byte()}),
    ("scales are not those", NVFP4, lambda m: {"scales": m.scales[:-1]}),
    ("16 groups of 32", NVFP4, lambda m: {"group": 32}),
    ("weights of 2 bits", NVFP4, lambda m: {"bits": 2}),
    ("lines of ", FP8, lambda m: {"bits": 4}),
    ("scales are not contig", BLOCKS, lambda m: {"scales": _gaps(m.scales)}),
    ("kind 3 has no tables", Integer(4, 128), lambda m: {"kind": Kind.LOOKUP}),
    ("tables are not uint8", NF4, lambda m: {"zeros": m.zeros.char()}),
    ("tables have 1 dim", NF4, lambda m: {"zeros": m.zeros[0]}),
    ("1 tables of 16 bytes for 32", NF4, lambda m: {"zeros": m.zeros[:1]}),
    ("2 tables of 8 bytes", NF4, lambda m: {"zeros": m.zeros[:, :8].contiguous()}),
    ("weights of 8 bits", NF4, lambda m: {"bits": 8}),
    ("weights of 8 bits", Integer(8, 128), lambda m: {"kind": Kind.MID}),
]


def _gaps(x: torch.Tensor) -> torch.Tensor:
    """The same numbers, of which every other place is skipped."""
    return torch.stack([x, x], -1)[..., 0]


@pytest.mark.parametrize(("message", "fmt", "change"), WRONG, ids=[m for m, *_ in WRONG])
def test_a_matrix_that_does_not_fit_is_refused(
    isa: Library, message: str, fmt: Format, change: Callable[[Packed], dict[str, Any]]
) -> None:
    good = packed(fmt)
    bad = replace(good, **change(good))
    with pytest.raises(RuntimeError, match=message):
        isa.linear(torch.randn(2, COLS), bad, None, Mode.EXACT)
    with pytest.raises(RuntimeError, match=message):
        isa.embed(torch.tensor([1]), bad)


@pytest.mark.parametrize(
    ("message", "signs"),
    [
        ("signs are not float32", torch.ones(2, 64).double()),
        ("signs have 1 dim", torch.ones(128)),
        ("signs are not contig", torch.ones(2, 128)[:, ::2]),
        ("signs are not those", torch.ones(3, 64)),
        ("signs are not those", torch.ones(2, 48)),
        ("signs are not those", torch.ones(2, 0)),
    ],
)
def test_signs_that_do_not_fit_are_refused(isa: Library, message: str, signs: torch.Tensor) -> None:
    good = packed(Integer(4, 128))
    with pytest.raises(RuntimeError, match=message):
        isa.rotated(
            torch.randn(2, COLS), None, 0, *good.settings, signs, good.weights, good.scales, None
        )


def test_inputs_that_do_not_fit_are_refused(isa: Library) -> None:
    good, x = packed(Integer(4, 128)), torch.randn(2, COLS)
    for message, inputs, bias, mode in (
        ("a bias of 31 for 32 rows", x, torch.zeros(31), 0),
        ("a bias of 32 for 32 rows", x, torch.zeros(4, 8), 0),
        ("biases are neither", x, torch.zeros(32).long(), 0),
        ("the input has 512 columns", torch.randn(2, 512), None, 0),
        ("inputs are neither", x.double(), None, 0),
        ("a single number", torch.tensor(1.0), None, 0),
        ("mode 7", x, None, 7),
    ):
        with pytest.raises(RuntimeError, match=message) as caught:
            isa.product(inputs, bias, mode, *good.settings, good.weights, good.scales, None)
        assert "\n" not in str(caught.value).strip()


@pytest.mark.parametrize("name", ["cpu", "cpu_exact", "torch_int4", "torch_int8", "reference"])
def test_products_refuse_what_would_broadcast(isa: Library, name: str) -> None:
    fmt = Integer(8, -1) if name == "torch_int8" else Integer(4, 128)
    prepared = dispatch.prepare(stored(fmt), Want(kernel=name))
    assert prepared.kernel == name
    with pytest.raises(IndexError, match=r"a bias of \[1\] for 32 rows"):
        dispatch.matmul(torch.randn(2, COLS), prepared, torch.zeros(1))
    with pytest.raises(IndexError, match="the input has 128 columns, the matrix 256"):
        dispatch.matmul(torch.randn(2, 128), prepared)


@pytest.mark.parametrize("name", ["cpu", "cpu_exact", "torch_int4", "torch_int8", "reference"])
@pytest.mark.parametrize(
    "fmt", [Integer(4, 128), Integer(8, -1), NF4, SPARSE, NVFP4, TRELLIS], ids=str
)
@pytest.mark.parametrize(("tokens", "rows", "cols"), [(0, 32, 256), (3, 0, 256), (3, 32, 0)])
def test_sizes_of_zero(
    isa: Library, name: str, fmt: Format, tokens: int, rows: int, cols: int
) -> None:
    """An empty sum is zero, so that the bias is what remains."""
    matrix = _empty(fmt, rows, cols)
    prepared = dispatch.prepare(matrix, Want(kernel=name))
    bias = torch.arange(rows, dtype=torch.float32)
    x = torch.ones(tokens, cols)
    out = dispatch.matmul(x, prepared, bias)
    assert out.shape == (tokens, rows)
    if not cols or not rows:
        assert torch.equal(out, bias.expand(tokens, rows))
    assert torch.equal(dispatch.matmul(x, prepared), out - bias)
    if rows:
        looked_up = dispatch.prepare(matrix, Want(kernel=name, embed=True))
        ids = torch.arange(tokens)
        assert dispatch.embed(ids, looked_up, torch.float32).shape == (tokens, cols)


def _empty(fmt: Format, rows: int, cols: int) -> Stored:
    """A matrix of that size, of ones or less."""
    if rows and cols:
        return stored(fmt, rows, cols)
    tensors = {}
    for name, spec in fmt.tensors(rows, cols).items():
        tensors[name] = torch.ones(spec.shape, dtype=getattr(torch, spec.dtype))
    return Stored.whole(fmt, tensors, (rows, cols))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_operators_divide_by_no_size_of_zero(isa: Library, dtype: torch.dtype) -> None:
    """What the door lets in although there is nothing in it."""
    good = packed(Integer(4, -1))
    narrow = replace(good, weights=good.weights[:, :0].contiguous(), cols=0)
    bias = torch.arange(32, dtype=dtype)
    x = torch.ones(3, 0, dtype=dtype)
    assert torch.equal(isa.linear(x, narrow, bias, Mode.INT8_PER_LINE), bias.expand(3, 32))
    assert torch.equal(isa.linear(x, narrow, None, Mode.EXACT), torch.zeros(3, 32, dtype=dtype))
    assert isa.embed(torch.tensor([31]), narrow).shape == (1, 0)
    low = replace(good, weights=good.weights[:0], scales=good.scales[:0], rows=0)
    assert isa.linear(torch.ones(3, COLS), low, None, Mode.EXACT).shape == (3, 0)
    assert isa.linear(torch.ones(0, COLS), good, bias, Mode.EXACT).shape == (0, 32)
    assert isa.embed(torch.empty(0, dtype=torch.int64), low).shape == (0, COLS)
    with pytest.raises(RuntimeError, match="id 0 is none of the 0 rows"):
        isa.embed(torch.tensor([0]), low)
