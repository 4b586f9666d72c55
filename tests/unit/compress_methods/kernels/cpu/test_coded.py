"""Our CPU products with tables and trellises equal a plain computation, in the stored bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress_methods import kernels
from compress_methods.formats import Stored
from compress_methods.formats.fitting.viterbi import encode_in_torch
from compress_methods.formats.lookup import FIXED, OF_FLOATS, Lookup
from compress_methods.formats.trellis import Trellis
from compress_methods.formats.wrappers.rotated import Rotated
from compress_methods.kernels import Want
from compress_methods.kernels.cpu import trellis as cpu_trellis
from compress_methods.kernels.cpu.library import Library
from tests.unit.compress_methods.drawn import GROUPS, lookups, trellises
from tests.unit.compress_methods.kernels.arithmetic import check_rows, check_sums, quantized

pytestmark = pytest.mark.usefixtures("poisoned_outputs")


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    """A format, a matrix of any rows and some piece of it, and tokens for that."""
    fmt = draw(st.one_of(lookups(), trellises(state_bits=(8, 9, 11))))
    rows = draw(st.integers(1, 150))
    cols = max(32, fmt.group_size) * draw(st.integers(1, 7))
    tokens = draw(st.one_of(st.integers(1, 9), st.integers(10, 60)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    weight = torch.randn(rows, cols, generator=generator) * 10.0 ** draw(st.integers(-3, 3))
    weight[torch.rand(rows, generator=generator) < 0.1] = 0
    whole = Stored.whole(fmt, fmt.pack(fmt.nearest(weight)), (rows, cols))
    unit = fmt.alignment(rows, cols)[0]
    first = unit * draw(st.integers(0, (rows - 1) // unit))
    x = torch.randn(tokens, 2 * cols, generator=generator) * 10.0 ** draw(st.integers(-3, 3))
    dtype = draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16)))
    of_floats = isinstance(fmt, Lookup) and fmt.of_floats
    layout = draw(st.sampled_from((slice(0, cols), slice(0, 2 * cols, 2))))
    return {
        "stored": whole.cut(rows=(first, rows)),
        "x": x.to(dtype)[:, layout],
        "bias": torch.randn(rows - first, generator=generator) if draw(st.booleans()) else None,
        "kernel": "cpu_exact" if of_floats else draw(st.sampled_from(("cpu", "cpu_exact"))),
    }


@given(case=cases())
def test_products_equal_the_arithmetic(isa: Library, case: dict[str, Any]) -> None:
    """Nothing is lost by what the int8 mode makes of values: they are bytes already."""
    stored, x, bias = case["stored"], case["x"], case["bias"]
    prepared = kernels.prepare(stored, Want(kernel=case["kernel"]))
    assert prepared.kernel == case["kernel"]
    out = kernels.matmul(x, prepared, bias)
    values = stored.values().double()
    inputs = quantized(x, per_token=False) if case["kernel"] == "cpu" else x.double()
    expected = inputs @ values.T + (0 if bias is None else bias)
    # With AVX-512 entries and the 128 added to them are summed apart.
    scales = stored.tensors["weight_scales"].double().abs()
    spread = scales.repeat_interleave(values.shape[1] // scales.shape[1], 1)
    size = inputs.abs() @ (values.abs() + 256 * spread).T
    assert out.dtype == x.dtype
    check_sums(out, expected, size, len(inputs.T))


@given(case=cases(), data=st.data())
def test_rows_are_looked_up(isa: Library, case: dict[str, Any], data: st.DataObject) -> None:
    check_rows(case["stored"], case["kernel"], data)


@pytest.mark.parametrize("table_rows", [1, 16, 128])
def test_the_table_takes_it_and_keeps_the_bytes_that_are_stored(
    isa: Library, table_rows: int
) -> None:
    """But for tables, which have 16 bytes each and are repeated for every 16 rows."""
    for bits in (2, 3, 4):
        fmt = Lookup(bits, 128, table_rows=table_rows)
        stored = Stored.whole(fmt, fmt.pack(fmt.nearest(torch.randn(256, 512))), (256, 512))
        if isa.isa != "plain":
            assert kernels.choose(stored).name == "cpu"
        prepared = kernels.prepare(stored, Want(kernel="cpu"))
        size = sum(t.numel() * t.element_size() for t in prepared.tensors)
        assert size == 256 * 512 * bits // 8 + 2 * 256 * 4 + 256 // min(16, table_rows) * 16


@pytest.mark.parametrize("table", OF_FLOATS)
@pytest.mark.parametrize("tokens", [1, 60])
def test_every_code_of_a_table_of_floats_is_what_the_table_says(
    isa: Library, table: str, tokens: int
) -> None:
    """To the last bit, which tables of bytes would lose."""
    fmt = Lookup(4, 64, table, scale_dtype="float32")
    solution = fmt.nearest(torch.randn(40, 256))
    solution.codes[:16] = torch.arange(16)[:, None]
    solution.scales[:16] = 1
    stored = Stored.whole(fmt, fmt.pack(solution), (40, 256))
    prepared = kernels.prepare(stored)
    if isa.isa != "plain":
        assert prepared.kernel == "cpu_exact"
    prepared = kernels.prepare(stored, Want(kernel="cpu_exact"))
    x = torch.eye(256)[:tokens]
    found = kernels.matmul(x, prepared)
    assert torch.equal(found, stored.values()[:, :tokens].T)
    assert torch.equal(found[0, :16], torch.tensor(FIXED[table], dtype=torch.float32))


@pytest.mark.parametrize("state_bits", [8, 12, 16])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_trellis_keeps_its_bytes_and_every_window_counts(
    isa: Library, bits: int, state_bits: int
) -> None:
    """Of any bits there can be, since what is stored need not come from us."""
    fmt, shape = Trellis(bits, state_bits), (150, 384)
    tensors = {name: spec.empty() for name, spec in fmt.tensors(*shape).items()}
    tensors["weight_packed"].random_(256)
    tensors["weight_scales"].uniform_(-1, 1)
    stored = Stored.whole(fmt, tensors, shape)
    if isa.isa != "plain":
        assert kernels.choose(stored).name == "cpu"
    prepared = kernels.prepare(stored, Want(kernel="cpu_exact"))
    assert prepared.tensors[0].numel() == 160 * 384 * bits // 8
    x, values = torch.randn(20, 384), stored.values().double()
    expected = x.double() @ values.T
    assert float((kernels.matmul(x, prepared) - expected).norm() / expected.norm()) < 1e-6


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_paths_are_those_that_torch_finds(isa: Library, bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    targets = torch.randn(5, 64, generator=generator) * 30
    weights = torch.rand(5, 64, generator=generator)
    values = Trellis(bits, 9).values(targets)
    found = cpu_trellis.encode(targets, weights, values, bits)
    assert torch.equal(found, encode_in_torch(targets, weights, values, bits))


@pytest.mark.parametrize("group", GROUPS)
def test_rotated_tables_are_multiplied_in_one_operator(isa: Library, group: int) -> None:
    fmt = Rotated(Lookup(3, group), 64)
    stored = Stored.whole(fmt, fmt.pack(fmt.base.nearest(torch.randn(80, 256))), (80, 256))
    prepared = kernels.prepare(stored, Want(kernel="cpu_exact"))
    assert [part.kernel for part in prepared.parts] == ["cpu_exact"]
    x = torch.randn(5, 256)
    expected = x.double() @ stored.values().double().T
    assert float((kernels.matmul(x, prepared) - expected).norm() / expected.norm()) < 1e-5
