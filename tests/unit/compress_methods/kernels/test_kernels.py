"""Every kernel of the table, by its name, against the values of the format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress_methods import kernels
from compress_methods.formats import Format, Stored
from compress_methods.formats.dense import Dense
from compress_methods.formats.encoding.grouped import SCALES, spread
from compress_methods.formats.wrappers.lowrank import LowRank
from compress_methods.formats.wrappers.rotated import INPUTS, Rotated
from compress_methods.formats.wrappers.shifted import OFFSETS, Shifted, centred
from compress_methods.kernels import Want
from compress_methods.kernels.cpu.sparse import takes
from compress_methods.kernels.dispatch import SIDE_BY_SIDE, ZEROS
from tests.unit.compress_methods.drawn import (
    Drawn,
    floats,
    formats,
    integers,
    lowrank,
    matrices,
    mid_integers,
    rotated,
    shifted,
    sparse,
    trains,
)
from tests.unit.compress_methods.kernels.arithmetic import per_token, quantized

OURS = st.one_of(integers(), mid_integers(), sparse(integers(symmetric=(True,))).filter(takes))
EIGHT_BITS = floats(("fp8", "mxfp8"))
EXACT = integers((8,))  # multiplied as the format says, by whichever kernel
CASES: dict[str, st.SearchStrategy[Drawn]] = {
    "torch_int4": matrices(integers((4,), (32, 64, 128), activations=(None,)), row_tile=16),
    "torch_int8": matrices(integers((8,), (-1,), (True,)), row_tile=16),
    "cpu": matrices(st.one_of(OURS, floats(("mxfp4", "nvfp4")))),
    "cpu_exact": matrices(st.one_of(OURS, floats(), sparse(st.just(Dense())))),
    "rotated": matrices(rotated(integers())),
    "lowrank": matrices(lowrank(st.one_of(EXACT, EIGHT_BITS, rotated(EXACT), st.none()))),
    "shifted": matrices(shifted()),
    "tensor_train": matrices(trains()),
    "reference": matrices(formats()),
}
LOOK_UP = [name for name in CASES if name not in ("torch_int4", "rotated", "lowrank", "shifted")]


APART = {SIDE_BY_SIDE, ZEROS, "triton", "padded", "reordered"}
"""Kernels whose matrices are not drawn here: they have tests of their own."""


def test_no_kernel_of_the_table_is_left_out() -> None:
    """vLLM's are entered by the plugin."""
    names = {name for name in kernels.KERNELS if not name.startswith("vllm_")}
    assert names - APART == set(CASES)


def stored_as(drawn: Drawn) -> Stored:
    fmt, weight = drawn
    return Stored.whole(fmt, fmt.pack(fmt.nearest(weight)), (weight.shape[0], weight.shape[1]))


def treated(fmt: Format, x: torch.Tensor) -> torch.Tensor:
    """What kernel `cpu` makes of its input, which a rotated format has turned."""
    codes = quantized(fmt.turn_inputs(x.float()), per_token(fmt.inner)).float()
    return fmt.turned_back(codes, -1, INPUTS) if isinstance(fmt, Rotated) else codes


def magnitudes(fmt: Format, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """[rows, cols]: what is summed for each value of a matrix, by absolute value."""
    if isinstance(fmt, Shifted):
        small = centred(fmt, tensors[SCALES], tensors[OFFSETS])
        offsets = spread(small, fmt.unpack(tensors).shape[1]).abs()
        return fmt.base.unpack(tensors).abs() + offsets
    if not isinstance(fmt, LowRank):
        return fmt.unpack(tensors).abs()
    found = fmt.solution(tensors)
    left, right = (fmt.factors.matrix(factor).abs() for factor in (found.left, found.right))
    return left @ right + (0 if fmt.base is None else fmt.base.matrix(found.base).abs())


@pytest.mark.parametrize("name", CASES)
def test_products_are_those_of_the_values(name: str) -> None:
    ran: list[str] = []

    @given(CASES[name], st.integers(1, 40), st.sampled_from((torch.bfloat16, torch.float32)))
    def check(drawn: Drawn, tokens: int, dtype: torch.dtype) -> None:
        fmt, weight = drawn
        rows, cols = weight.shape
        stored = stored_as(drawn)
        wide = torch.randn(tokens, 2 * cols, generator=torch.Generator().manual_seed(tokens))
        x, bias = wide.to(dtype)[:, ::2], torch.randn(rows).to(dtype)
        prepared = kernels.prepare(stored, Want(kernel=name))
        assert prepared.kernel == name
        out = kernels.matmul(x, prepared, bias)
        assert out.dtype == dtype
        assert out.shape == (tokens, rows)
        values = fmt.unpack(stored.tensors)
        inputs: Any = fmt.quantize_activations(x.float())
        if name == "cpu" or (name == "rotated" and prepared.parts[0].kernel == "cpu"):
            inputs = treated(fmt, x)
        exact = inputs @ values.T + bias.float()
        if name == "shifted" and prepared.parts[0].kernel == "cpu":
            # The base sees codes of the inputs, the offsets the inputs themselves.
            base = fmt.base.unpack(stored.tensors)
            exact += (treated(fmt.base, x) - x.float()) @ base.T
        # bfloat16 keeps 8 bits: inputs, scales' zeros and outputs are each rounded once.
        scale = x.float().abs() @ magnitudes(fmt, stored.tensors).T + bias.float().abs()
        if any(isinstance(part, Rotated) for part in (fmt, getattr(fmt, "base", None))):
            # Outputs are made of all those of their block.
            scale = scale.amax(1, keepdim=True)
        tolerance = 2**-18 if name == "reference" and dtype == torch.float32 else 2**-6
        assert bool(((out.float() - exact).abs() <= tolerance * scale + 1e-30).all())
        ran.append(prepared.kernel)

    check()
    assert len(ran) >= settings().max_examples
    assert set(ran) == {name}


@pytest.mark.parametrize("name", LOOK_UP)
def test_lookup_gives_rows_of_the_matrix(name: str) -> None:
    @given(CASES[name], st.data())
    def check(drawn: Drawn, data: st.DataObject) -> None:
        fmt, weight = drawn
        stored = stored_as(drawn)
        rows = st.integers(0, len(weight) - 1)
        ids = torch.tensor(data.draw(st.lists(rows, min_size=1, max_size=9)))
        prepared = kernels.prepare(stored, Want(embed=True, kernel=name))
        assert prepared.kernel == name
        found = kernels.embed(ids, prepared, torch.float32)
        torch.testing.assert_close(found, fmt.unpack(stored.tensors)[ids], rtol=1e-6, atol=0)

    check()
