"""Our CPU products with floats equal a plain computation, and hold what the checkpoint does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress_methods import kernels
from compress_methods.formats import Stored
from compress_methods.formats.floats import Float
from compress_methods.formats.wrappers.rotated import Rotated
from compress_methods.kernels import Want
from compress_methods.kernels.cpu.library import Library
from tests.unit.compress_methods.drawn import floats, least_columns
from tests.unit.compress_methods.kernels.arithmetic import check_rows, check_sums, quantized

KINDS = [
    Float(),
    Float("fp8", 32),
    Float("fp8", 128, 128),
    *map(Float, ("mxfp8", "mxfp4", "nvfp4")),
]


pytestmark = pytest.mark.usefixtures("poisoned_outputs")


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    """A format, a matrix of any rows and some piece of it, and tokens for that."""
    fmt = draw(floats())
    rows = draw(st.integers(1, 200))
    unit = least_columns(fmt)
    cols = unit * draw(st.integers(1, max(7, 300 // unit)))
    tokens = draw(st.one_of(st.integers(1, 9), st.integers(10, 60)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    weight = torch.randn(rows, cols, generator=generator) * 10.0 ** draw(st.integers(-3, 3))
    weight *= torch.randn(rows, 1, generator=generator).mul(3).exp()
    weight[torch.rand(rows, generator=generator) < 0.1] = 0
    whole = Stored.whole(fmt, fmt.pack(fmt.nearest(weight)), (rows, cols))
    unit = fmt.alignment(rows, cols)[0]
    first = unit * draw(st.integers(0, (rows - 1) // unit))
    x = torch.randn(tokens, 2 * cols, generator=generator) * 10.0 ** draw(st.integers(-3, 3))
    dtype = draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16)))
    layout = draw(st.sampled_from((slice(0, cols), slice(0, 2 * cols, 2))))
    return {
        "stored": whole.cut(rows=(first, rows)),
        "x": x.to(dtype)[:, layout],
        "bias": torch.randn(rows - first, generator=generator) if draw(st.booleans()) else None,
        "kernel": draw(st.sampled_from(("cpu", "cpu_exact"))) if fmt.bits == 4 else "cpu_exact",
    }


@given(case=cases())
def test_products_equal_the_arithmetic(isa: Library, case: dict[str, Any]) -> None:
    """Of 4 bits nothing is lost in the int8 mode: twice the values are whole numbers."""
    stored, x, bias = case["stored"], case["x"], case["bias"]
    prepared = kernels.prepare(stored, Want(kernel=case["kernel"]))
    assert prepared.kernel == case["kernel"]
    out = kernels.matmul(x, prepared, bias)
    values = stored.values().double()
    inputs = stored.format.quantize_activations(x.float()).double()
    if case["kernel"] == "cpu":
        inputs = quantized(x, per_token=False)
    expected = inputs @ values.T + (0 if bias is None else bias)
    # With AVX-512 entries of the table and the 128 added to them are summed apart.
    fmt = stored.format
    ones = {**stored.tensors, "weight_packed": torch.ones_like(stored.tensors["weight_packed"])}
    beside = 512 * fmt.unpack(ones).abs().double() if fmt.bits == 4 else 0
    if fmt.bits == 4:  # codes of 1 are a half, those of 0 nothing
        beside = beside + beside.roll(1, 1)
    size = inputs.abs() @ (values.abs() + beside).T
    assert out.dtype == x.dtype
    check_sums(out, expected, size, len(inputs.T))


@given(case=cases(), data=st.data())
def test_rows_are_looked_up(isa: Library, case: dict[str, Any], data: st.DataObject) -> None:
    check_rows(case["stored"], case["kernel"], data)


@pytest.mark.parametrize("fmt", KINDS, ids=lambda fmt: fmt.describe())
def test_the_table_takes_it_and_keeps_the_bytes_that_are_stored(isa: Library, fmt: Float) -> None:
    stored = Stored.whole(fmt, fmt.pack(fmt.nearest(torch.randn(256, 512))), (256, 512))
    if isa.isa != "plain":
        assert kernels.choose(stored).name == ("cpu" if fmt.bits == 4 else "cpu_exact")
    prepared = kernels.prepare(stored, Want(kernel="cpu_exact"))
    size = sum(t.numel() * t.element_size() for t in prepared.tensors)
    assert size == fmt.nbytes(256, 512)


@pytest.mark.parametrize("kind", ["mxfp8", "mxfp4", "nvfp4"])
def test_every_scale_of_eight_bits_is_read_as_stored(isa: Library, kind: str) -> None:
    """One for each row: E8M0's least powers and most of the others, the greatest of which E4M3
    takes beyond float32; E4M3's subnormals and negatives."""
    fmt, rows = Float(kind), 256
    torch.manual_seed(0)
    tensors = dict(fmt.pack(fmt.nearest(torch.randn(rows, 32))))
    codes = torch.arange(rows, dtype=torch.uint8)
    codes[(codes & 127 == 127) | (codes > 238)] = 1
    scales = codes[:, None].expand(tensors["weight_scales"].shape).contiguous()
    tensors["weight_scales"] = scales.view(tensors["weight_scales"].dtype)
    stored = Stored.whole(fmt, tensors, (rows, 32))
    values = stored.values()
    assert len(values.abs().amax(1).unique()) > 100
    prepared = kernels.prepare(stored, Want(kernel="cpu_exact", embed=True))
    assert torch.equal(kernels.embed(torch.arange(rows), prepared, torch.float32), values)
    x = torch.randn(2, 32)
    found, expected = kernels.matmul(x, prepared).double(), x.double() @ values.double().T
    scale = values.double().abs().amax(1)
    assert bool(((found - expected).abs() <= 1e-3 * scale).all())


@pytest.mark.parametrize("fmt", KINDS, ids=lambda fmt: fmt.describe())
def test_rotated_floats_are_multiplied_in_one_operator(isa: Library, fmt: Float) -> None:
    turned = Rotated(fmt, 64)
    stored = Stored.whole(turned, fmt.pack(fmt.nearest(torch.randn(80, 256))), (80, 256))
    prepared = kernels.prepare(stored, Want(kernel="cpu_exact"))
    assert [part.kernel for part in prepared.parts] == ["cpu_exact"]
    assert kernels.kernel("rotated").operator(prepared) is not None
    x = torch.randn(5, 256)
    expected = x.double() @ stored.values().double().T
    assert float((kernels.matmul(x, prepared) - expected).norm() / expected.norm()) < 1e-5
