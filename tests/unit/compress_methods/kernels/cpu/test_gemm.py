"""Our CPU products equal a plain computation of the same arithmetic, for every format and shape."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress_methods.formats import Stored
from compress_methods.formats.integer import MID, WHOLE, Integer
from compress_methods.kernels import Prepared, Want
from compress_methods.kernels.cpu import build
from compress_methods.kernels.cpu.gemm import CpuExact, CpuGemm
from compress_methods.kernels.cpu.library import LINE, Library, Mode
from tests.unit.compress_methods.kernels.arithmetic import (
    WIDTHS,
    check_sums,
    compiled,
    quantized,
    using,
)

EMULATION = Path(__file__).parent / "emulated_vnni.h"
ISAS = [isa for isa in build.INSTRUCTION_SETS if isa in WIDTHS and build.runs_here(isa)]
EMULATED = "emulated_vnni"  # the code for VNNI where a processor has none
if "avx2" in ISAS and "avx_vnni" not in ISAS:
    ISAS.append(EMULATED)
KERNELS = {"cpu": CpuGemm(), "cpu_exact": CpuExact()}


pytestmark = pytest.mark.usefixtures("poisoned_outputs")


def flags_of(isa: str) -> tuple[str, ...]:
    if isa != EMULATED:
        return build.INSTRUCTION_SETS[isa]
    emulation = ("-include", str(EMULATION), "-DVC_DOT_BYTES=emulated_dot_bytes")
    return (*build.INSTRUCTION_SETS["avx2"], *emulation)


@pytest.fixture(scope="module", params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[Library]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(build.INSTRUCTION_SETS, request.param, flags_of(request.param))
        loaded = compiled(request.param)
    with using(loaded):
        yield loaded


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    """A format, a matrix with odd rows and values of any size, and tokens for it."""
    group = draw(st.sampled_from((-1, 32, 64, 128)))
    levels, bits = draw(st.sampled_from((WHOLE, WHOLE, MID))), (2, 3, 4, 5, 6, 8)
    fmt = Integer(
        bits=draw(st.sampled_from(bits if levels == WHOLE else bits[:3])),
        group_size=group,
        symmetric=levels == MID or draw(st.booleans()),
        levels=levels,
        activations=draw(st.sampled_from((None, "int8"))),
        scale_dtype=draw(st.sampled_from(("bfloat16", "float16"))),
    )
    rows = draw(st.integers(1, 70))
    cols = max(32, group) * draw(st.integers(1, 9))
    tokens = draw(st.one_of(st.integers(1, 9), st.integers(10, 300)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    weight = torch.randn(rows, cols, generator=generator)
    weight *= 10.0 ** draw(st.integers(-3, 3))
    weight[torch.rand(rows, generator=generator) < 0.1] = 0
    x = torch.randn(tokens, 2 * cols, generator=generator) * 10.0 ** draw(st.integers(-4, 4))
    x[torch.rand(x.shape, generator=generator) < 0.01] *= 100
    x[torch.rand(tokens, generator=generator) < 0.1] = 0
    dtype = draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16)))
    layout = draw(st.sampled_from((slice(0, cols), slice(0, 2 * cols, 2))))
    return {
        "fmt": fmt,
        "weight": weight,
        "x": x.clamp(-1e4, 1e4).to(dtype)[:, layout],
        "bias": torch.randn(rows, generator=generator) if draw(st.booleans()) else None,
        "kernel": KERNELS[draw(st.sampled_from(tuple(KERNELS)))],
    }


def prepare(kernel: CpuGemm, fmt: Integer, stored: dict[str, torch.Tensor], cols: int) -> Prepared:
    shape = (len(stored["weight_scales"]), cols)
    return kernel.prepare(Stored.whole(fmt, stored, shape), Want())


@given(case=cases())
def test_products_equal_the_arithmetic(isa: Library, case: dict[str, Any]) -> None:
    fmt, x, bias, kernel = case["fmt"], case["x"], case["bias"], case["kernel"]
    cols = case["weight"].shape[1]
    stored = fmt.pack(fmt.nearest(case["weight"]))
    values = fmt.unpack(stored).double()
    per_token = fmt.activations == "int8"
    if per_token or kernel.name == "cpu":
        inputs = quantized(x, per_token)
    else:
        inputs = x.double()
    out = kernel.matmul(x, prepare(kernel, fmt, stored, cols), bias)
    assert out.dtype == x.dtype
    expected = inputs @ values.T + (0 if bias is None else bias)
    # Codes and zero points are summed apart, each in float32; the output is rounded to its dtype.
    grid = fmt.decode(torch.tensor(2.0**fmt.bits), torch.tensor(1.0), torch.tensor(0.0))
    size = inputs.abs() @ (values.abs() + grid * spread(fmt, stored, cols)).T
    check_sums(out, expected, size, cols)


def spread(fmt: Integer, stored: dict[str, torch.Tensor], cols: int) -> torch.Tensor:
    """Every value's scale, float64 [rows, cols]."""
    scales = stored["weight_scales"].double()
    return scales.repeat_interleave(cols // scales.shape[1], 1)


@given(case=cases())
def test_int8_activations_err_by_half_a_step(isa: Library, case: dict[str, Any]) -> None:
    """What quantizing activations may cost, from nothing but the step of each line."""
    fmt, x = Integer(case["fmt"].bits, case["fmt"].group_size), case["x"].float()
    cols = case["weight"].shape[1]
    stored = fmt.pack(fmt.nearest(case["weight"]))
    values = fmt.unpack(stored)
    exact, quick = (
        kernel.matmul(x, prepare(kernel, fmt, stored, cols), None).double()
        for kernel in (KERNELS["cpu_exact"], KERNELS["cpu"])
    )
    lines = torch.nn.functional.pad(x, (0, -cols % LINE)).unflatten(1, (-1, LINE))
    step = (lines.abs().amax(-1) / 127).repeat_interleave(LINE, 1)[:, :cols].double()
    size = x.abs().double() @ (values.abs() + 2**fmt.bits * spread(fmt, stored, cols)).double().T
    bound = 0.5001 * step @ values.abs().double().T + (cols + 8) * 2**-23 * size
    assert bool(((quick - exact).abs() <= bound + 1e-30).all())


@given(case=cases(), data=st.data())
def test_lookup_gives_rows(isa: Library, case: dict[str, Any], data: st.DataObject) -> None:
    fmt, weight = case["fmt"], case["weight"]
    stored = fmt.pack(fmt.nearest(weight))
    ids = torch.tensor(data.draw(st.lists(st.integers(0, len(weight) - 1), max_size=9)), dtype=int)
    found = CpuGemm().embed(ids, prepare(CpuGemm(), fmt, stored, weight.shape[1]))
    assert torch.equal(found, fmt.unpack(stored)[ids])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_what_is_not_finite_spoils_its_own_token_only(
    isa: Library, kernel: CpuGemm, bad: float
) -> None:
    fmt, weight = Integer(4, 128), torch.randn(20, 256)
    prepared = prepare(kernel, fmt, fmt.pack(fmt.nearest(weight)), 256)
    x = torch.randn(5, 256)
    clean = kernel.matmul(x, prepared, None)
    x[3, 130] = bad
    out = kernel.matmul(x, prepared, None)
    assert not out[3].isfinite().any()
    rest = [0, 1, 2, 4]
    assert torch.equal(out[rest], clean[rest])


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_many_tokens_are_those_of_smaller_calls(isa: Library, kernel: CpuGemm) -> None:
    """Activations are held for 512 tokens at a time."""
    fmt, weight = Integer(4, 128), torch.randn(20, 256)
    prepared = prepare(kernel, fmt, fmt.pack(fmt.nearest(weight)), 256)
    x = torch.randn(1300, 256)
    pieces = [kernel.matmul(part, prepared, None) for part in x.split(100)]
    assert torch.equal(kernel.matmul(x, prepared, None), torch.cat(pieces))
    assert kernel.matmul(x[:0], prepared, None).shape == (0, 20)


def test_wide_matrices_with_zero_points_are_laid_out_in_pieces(isa: Library) -> None:
    """Eight rows share bytes of zero points, and pieces are cut between them."""
    fmt, cols = Integer(4, 128, symmetric=False), 11008
    stored = fmt.pack(fmt.nearest(torch.randn(400, cols)))
    prepared = prepare(CpuGemm(), fmt, stored, cols)
    ids = torch.tensor([0, 380, 381, 399])
    assert torch.equal(CpuGemm().embed(ids, prepared), fmt.unpack(stored)[ids])


@pytest.mark.parametrize("tokens", [1, 50])
def test_threads_change_nothing(isa: Library, tokens: int) -> None:
    fmt, weight = Integer(3, 64), torch.randn(500, 640)
    prepared = prepare(CpuGemm(), fmt, fmt.pack(fmt.nearest(weight)), 640)
    x, outs, before = torch.randn(tokens, 640), [], torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            outs.append(CpuGemm().matmul(x, prepared, None))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*outs)


def test_mode_numbers_are_those_of_the_source() -> None:
    header = (build.SOURCES / "numbers.h").read_text()
    listed = ", ".join(f"k{m.name.title().replace('_', '')} = {m.value}" for m in Mode)
    assert f"enum class Mode : int32_t {{ {listed} }}" in header
