"""Our CPU products with sparse matrices equal a plain computation, for every n:m, value format and
shape; what they keep in memory is what the checkpoint stores."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress_methods import kernels
from compress_methods.errors import FormatError
from compress_methods.formats import Format, Stored
from compress_methods.formats.dense import Dense
from compress_methods.formats.integer import Integer
from compress_methods.formats.sparse import BLOCKS, Sparse, SparseSolution
from compress_methods.kernels import Prepared, Want
from compress_methods.kernels.cpu import sparse as cpu_sparse
from compress_methods.kernels.cpu.gemm import CpuExact, CpuGemm
from compress_methods.kernels.cpu.library import Library
from tests.unit.compress_methods.kernels.arithmetic import check_sums, per_token, quantized

pytestmark = pytest.mark.usefixtures("poisoned_outputs")


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    """Any format the product takes, a matrix with any mask in it, and tokens for it."""
    m = draw(st.sampled_from(BLOCKS))
    n = draw(st.one_of(st.just(m // 2), st.integers(1, m)))
    values: Format = Dense(draw(st.sampled_from(("bfloat16", "float16"))))
    unit = max(m, 8)
    if draw(st.integers(0, 2)):
        group = draw(st.sampled_from((-1, 32, 64, 128)))
        activations = draw(st.sampled_from((None, "int8")))
        values = Integer(draw(st.sampled_from((2, 3, 4, 6, 8))), group, activations=activations)
        if not cpu_sparse.takes(Sparse(n, m, values)):
            n = m // 2
        if not cpu_sparse.takes(Sparse(n, m, values)):
            values = Integer(values.bits, -1, activations=activations)
    fmt = Sparse(n, m, values)
    cols = unit * draw(st.integers(1, 5))
    while not fits(fmt, cols):
        cols += unit
    rows = draw(st.integers(1, 40))
    tokens = draw(st.one_of(st.integers(1, 9), st.integers(10, 90)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    weight = torch.randn(rows, cols, generator=generator) * 10.0 ** draw(st.integers(-2, 2))
    weight[torch.rand(rows, generator=generator) < 0.1] = 0
    mask = fmt.select(torch.rand(rows, cols, generator=generator))
    solution = SparseSolution(mask, values.nearest(fmt.compact(weight, mask)))
    x = torch.randn(tokens, 2 * cols, generator=generator) * 10.0 ** draw(st.integers(-3, 3))
    dtype = draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16)))
    layout = draw(st.sampled_from((slice(0, cols), slice(0, 2 * cols, 2))))
    stored = fmt.pack(solution)
    whole = Stored.whole(fmt, stored, (rows, cols))
    both = (CpuGemm(), CpuExact())
    takers = [k for k in both if k.rank(whole, Want(kernel=k.name)) is not None]
    return {
        "fmt": fmt,
        "stored": stored,
        "shape": (rows, cols),
        "x": x.to(dtype)[:, layout],
        "bias": torch.randn(rows, generator=generator) if draw(st.booleans()) else None,
        "kernel": draw(st.sampled_from(takers)),
    }


def fits(fmt: Format, cols: int) -> bool:
    try:
        fmt.check_shape(1, cols)
    except FormatError:
        return False
    return True


def prepare(
    kernel: CpuGemm, fmt: Format, stored: dict[str, torch.Tensor], shape: tuple[int, int]
) -> Prepared:
    return kernel.prepare(Stored.whole(fmt, stored, shape), Want())


@given(case=cases())
def test_products_equal_the_arithmetic(isa: Library, case: dict[str, Any]) -> None:
    fmt, x, bias, kernel = case["fmt"], case["x"], case["bias"], case["kernel"]
    values = fmt.unpack(case["stored"]).double()
    exact = kernel.name == "cpu_exact" and not per_token(fmt)
    inputs = x.double() if exact else quantized(x, per_token(fmt))
    out = kernel.matmul(x, prepare(kernel, fmt, case["stored"], case["shape"]), bias)
    assert out.dtype == x.dtype
    expected = inputs @ values.T + (0 if bias is None else bias)
    size = inputs.abs() @ values.abs().T
    check_sums(out, expected, size, x.shape[1])


@given(case=cases(), data=st.data())
def test_lookup_gives_rows(isa: Library, case: dict[str, Any], data: st.DataObject) -> None:
    fmt, kernel, (rows, _) = case["fmt"], case["kernel"], case["shape"]
    ids = torch.tensor(data.draw(st.lists(st.integers(0, rows - 1), max_size=9)), dtype=int)
    found = kernel.embed(ids, prepare(kernel, fmt, case["stored"], case["shape"]))
    assert torch.equal(found, fmt.unpack(case["stored"])[ids])


@pytest.mark.parametrize("tokens", [1, 50])
def test_threads_change_nothing(isa: Library, tokens: int) -> None:
    fmt, weight = Sparse(64, 128, Integer(4, 128)), torch.randn(500, 1280)
    prepared = prepare(CpuGemm(), fmt, fmt.pack(fmt.nearest(weight)), (500, 1280))
    x, outs, before = torch.randn(tokens, 1280), [], torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            outs.append(CpuGemm().matmul(x, prepared, None))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*outs)


@pytest.mark.parametrize("values", [Integer(8, -1), Integer(4, 128), Dense()], ids=str)
@pytest.mark.parametrize("m", BLOCKS)
def test_memory_is_what_the_checkpoint_stores(values: Format, m: int) -> None:
    fmt, shape = Sparse(m // 2, m, values), (64, 1024)
    stored = fmt.pack(fmt.nearest(torch.randn(shape)))
    prepared = prepare(CpuExact(), fmt, stored, shape)
    assert sum(t.untyped_storage().nbytes() for t in prepared.tensors) == fmt.nbytes(*shape)


def test_a_mask_of_another_count_is_refused_before_it_is_read() -> None:
    fmt, shape = Sparse(64, 128, Integer(8, -1)), (4, 256)
    stored = fmt.pack(fmt.nearest(torch.randn(shape)))
    stored["weight_mask"][2] = 0xFF
    with pytest.raises(FormatError, match="row 2 keeps 128 of columns 0 to 127, expected 64"):
        prepare(CpuGemm(), fmt, stored, shape)


def test_integers_meet_int8_activations_and_floats_exact_ones() -> None:
    def chosen(values: Format, n: int = 64) -> str:
        fmt = Sparse(n, 128, values)
        stored = fmt.pack(fmt.nearest(torch.randn(64, 256)))
        return kernels.choose(Stored.whole(fmt, stored, (64, 256))).name

    assert [chosen(Integer(8, -1)), chosen(Integer(4, 128))] == ["cpu", "cpu"]
    assert [chosen(Dense()), chosen(Dense("float16"))] == ["cpu_exact", "cpu_exact"]
    assert chosen(Dense("float32")) == "reference"
    assert chosen(Integer(4, 128, symmetric=False)) == "reference"
    assert chosen(Integer(4, 32)) == "reference"
