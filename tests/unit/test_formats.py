"""Formats against their own declaration and the plain reference."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress_methods import kernels
from compress_methods.errors import FormatError
from compress_methods.formats import Format, format_from_dict
from compress_methods.formats.base import Prepared
from compress_methods.formats.dense import Dense
from compress_methods.formats.integer import Integer, pack_codes, unpack_codes
from compress_methods.formats.sparse import BLOCKS, Sparse, SparseSolution
from compress_methods.kernels import cpu_gemm

GROUPS = (-1, 32, 64, 128)


@st.composite
def matrices(draw: st.DrawFn) -> tuple[Format, torch.Tensor]:
    """A format and a matrix it can hold: odd row counts, zero rows, huge and tiny values."""
    group = draw(st.sampled_from(GROUPS))
    fmt: Format = Integer(
        bits=draw(st.sampled_from((2, 3, 4, 8))),
        group_size=group,
        symmetric=draw(st.booleans()),
        activations=draw(st.sampled_from((None, "int8"))),
    )
    if draw(st.integers(0, 9)) == 0:
        fmt = Dense()
    rows = draw(st.integers(1, 70))
    unit = 1 if isinstance(fmt, Dense) else 32 if group < 0 else group
    if draw(st.booleans()):
        m = draw(st.sampled_from(BLOCKS))
        n = draw(st.integers(1, m)) if unit == 1 else m // draw(st.sampled_from((2, 4)))
        fmt = Sparse(n, m, fmt)
        unit = math.lcm(8, m * unit // math.gcd(unit, n))
    cols = unit * draw(st.integers(1, max(1, 384 // unit)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    weight = torch.randn(rows, cols, generator=generator)
    weight *= 10.0 ** draw(st.integers(-12, 12))
    if draw(st.booleans()):
        weight[draw(st.integers(0, rows - 1))] = 0
    return fmt, weight


@settings(max_examples=60, deadline=None)
@given(matrices())
def test_stored_tensors_are_exactly_what_is_declared(drawn: tuple[Format, torch.Tensor]) -> None:
    fmt, weight = drawn
    stored = fmt.pack(fmt.nearest(weight))
    declared = fmt.tensors(*weight.shape)
    found = {name: (tuple(t.shape), t.dtype) for name, t in stored.items()}
    assert found == {name: (spec.shape, spec.dtype) for name, spec in declared.items()}
    assert fmt.nbytes(*weight.shape) == sum(t.numel() * t.element_size() for t in stored.values())


@settings(max_examples=60, deadline=None)
@given(matrices())
def test_no_value_is_further_than_its_step_allows(drawn: tuple[Format, torch.Tensor]) -> None:
    fmt, weight = drawn
    if not isinstance(fmt, Integer):
        return
    solution = fmt.nearest(weight)
    values = fmt.unpack(fmt.pack(solution))
    steps = solution.scales.float().repeat_interleave(
        weight.shape[1] // fmt.groups(weight.shape[1]), 1
    )
    # Half a step, another half where zero points are rounded too; at the ends of the range, what
    # rounding the scale to bfloat16 (one part in 2^9) took off it.
    bound = steps * (1 + 2.0 ** (fmt.bits - 9))
    assert bool(((values - weight).abs() <= bound).logical_or(weight == 0).all())
    assert bool((values[(weight == 0).all(1)] == 0).all())


@st.composite
def sparse_matrices(draw: st.DrawFn) -> tuple[Sparse, torch.Tensor]:
    """Any n of any m of values that are kept exactly, with ties."""
    m = draw(st.sampled_from(BLOCKS))
    fmt = Sparse(draw(st.integers(1, m)), m, Dense("float32"))
    cols = max(m, 8) * draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    weight = torch.randn(draw(st.integers(1, 9)), cols, generator=generator)
    return fmt, (4 * weight).round() if draw(st.booleans()) else weight


@settings(max_examples=60, deadline=None)
@given(sparse_matrices())
def test_sparse_keeps_the_first_largest_n_of_every_m_exactly(
    drawn: tuple[Sparse, torch.Tensor],
) -> None:
    fmt, weight = drawn
    expected = torch.zeros_like(weight)
    for row in range(len(weight)):
        for start in range(0, weight.shape[1], fmt.m):
            block = range(start, start + fmt.m)
            for col in sorted(block, key=lambda c: (-abs(float(weight[row, c])), c))[: fmt.n]:
                expected[row, col] = weight[row, col]
    stored = fmt.pack(fmt.nearest(weight))
    assert torch.equal(fmt.unpack(stored), expected)


@settings(max_examples=60, deadline=None)
@given(sparse_matrices(), st.randoms())
def test_sparse_holds_any_mask_of_n_in_every_m(
    drawn: tuple[Sparse, torch.Tensor], random: Any
) -> None:
    fmt, weight = drawn
    mask = torch.zeros(weight.shape, dtype=torch.bool)
    for row in range(len(weight)):
        for start in range(0, weight.shape[1], fmt.m):
            mask[row, random.sample(range(start, start + fmt.m), fmt.n)] = True
    compacted = fmt.compact(weight, mask)
    assert torch.equal(fmt.compact(fmt.expand(compacted, mask), mask), compacted)
    stored = fmt.pack(SparseSolution(mask, compacted))
    assert torch.equal(fmt.mask(stored), mask)
    assert torch.equal(fmt.unpack(stored), weight * mask)


def test_a_mask_of_another_count_is_refused_by_row_and_columns() -> None:
    fmt = Sparse(2, 4, Dense())
    stored = fmt.pack(fmt.nearest(torch.randn(3, 16)))
    stored["weight_mask"][1, 1] |= 0xF0
    with pytest.raises(FormatError, match="row 1 keeps 4 of columns 12 to 15, expected 2"):
        fmt.unpack(stored)


def test_a_sparse_format_survives_its_json_form() -> None:
    fmt = Sparse(64, 128, Integer(8, -1, activations="int8"))
    assert format_from_dict(json.loads(json.dumps(fmt.to_dict()))) == fmt
    assert fmt.describe() == "64:128 int8 row + int8 activations"


def test_half_of_int8_is_stored_in_5_bits_and_of_bfloat16_in_9() -> None:
    rows, cols = 64, 4096
    for values, bits in ((Integer(8, -1), 5 + 16 / cols), (Dense(), 9), (Integer(4, 128), 3.0625)):
        for m in BLOCKS:
            fmt = Sparse(m // 2, m, values)
            assert 8 * fmt.nbytes(rows, cols) / (rows * cols) == bits


@pytest.mark.parametrize(
    ("fmt", "shape", "words"),
    [
        (Sparse(64, 128, Dense()), (8, 192), "m: 128 does not divide 192 columns"),
        (Sparse(2, 4, Dense()), (8, 12), "m: 8 does not divide 12 columns"),
        (Sparse(3, 8, Integer(8, -1)), (8, 64), "3 of 8 of 64 columns: 24 columns are no multiple"),
    ],
)
def test_columns_that_do_not_fit_are_named(fmt: Format, shape: tuple[int, int], words: str) -> None:
    with pytest.raises(FormatError, match=words):
        fmt.tensors(*shape)


@settings(max_examples=60, deadline=None)
@given(matrices(), st.data())
def test_a_slice_of_the_stored_form_is_the_slice_of_the_matrix(
    drawn: tuple[Format, torch.Tensor], data: st.DataObject
) -> None:
    fmt, weight = drawn
    shape = tuple(weight.shape)
    stored = fmt.pack(fmt.nearest(weight))
    whole = fmt.unpack(stored)
    cuts = []
    for size, unit in zip(shape, fmt.units(*shape), strict=True):
        places = [*range(0, size, unit), size]
        first, last = sorted(data.draw(st.lists(st.sampled_from(places), min_size=2, max_size=2)))
        cuts.append((first, last))
    (r0, r1), (c0, c1) = cuts
    if r0 == r1 or c0 == c1:
        return
    sliced = fmt.slice(stored, shape, rows=(r0, r1), cols=(c0, c1))
    expected = fmt.tensors(r1 - r0, c1 - c0)
    assert {n: tuple(t.shape) for n, t in sliced.items()} == {
        n: s.shape for n, s in expected.items()
    }
    torch.testing.assert_close(fmt.unpack(sliced), whole[r0:r1, c0:c1], rtol=0, atol=0)


@settings(max_examples=80, deadline=None)
@given(
    matrices(),
    st.integers(1, 40),
    st.sampled_from((torch.bfloat16, torch.float32)),
    st.sampled_from(sorted(set(kernels.KERNELS) - {"cpu"})),
)
def test_every_exact_kernel_multiplies_as_the_reference(
    drawn: tuple[Format, torch.Tensor], tokens: int, dtype: torch.dtype, name: str
) -> None:
    fmt, weight = drawn
    rows, cols = weight.shape
    kernel = kernels.KERNELS[name]
    if not kernel.supports(fmt, rows, cols, weight.device):
        kernel = kernels.KERNELS["reference"]
    stored = fmt.pack(fmt.nearest(weight))
    wide = torch.randn(tokens, 2 * cols, generator=torch.Generator().manual_seed(tokens)).to(dtype)
    x = wide[:, ::2]
    bias = torch.randn(rows).to(dtype)
    values = fmt.unpack(stored)
    exact = fmt.quantize_activations(x.float()) @ values.T + bias.float()
    packed = kernel.prepare(fmt, [stored[n] for n in fmt.tensors(rows, cols)], rows, cols)
    prepared = Prepared(kernel.name, packed, rows, cols)
    out = fmt.matmul(x, prepared, bias)
    assert out.dtype == dtype
    assert out.shape == (tokens, rows)
    # bfloat16 keeps 8 bits: inputs, scales' zeros and outputs are each rounded once.
    scale = x.float().abs() @ values.abs().T + bias.float().abs()
    tolerance = 2**-18 if prepared.kernel == "reference" and dtype == torch.float32 else 2**-6
    assert bool(((out.float() - exact).abs() <= tolerance * scale + 1e-30).all())


@settings(max_examples=40, deadline=None)
@given(matrices(), st.data())
def test_lookup_gives_rows_of_the_matrix(
    drawn: tuple[Format, torch.Tensor], data: st.DataObject
) -> None:
    fmt, weight = drawn
    rows, cols = weight.shape
    stored = fmt.pack(fmt.nearest(weight))
    ids = torch.tensor(data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=9)))
    found = fmt.embed(ids, fmt.prepare(stored, rows, cols, gather=True), torch.float32)
    torch.testing.assert_close(found, fmt.unpack(stored)[ids], rtol=1e-6, atol=0)


@given(
    st.sampled_from((2, 3, 4, 8)),
    st.integers(1, 5),
    st.integers(1, 6),
    st.sampled_from((8, 32, 128)),
)
def test_packing_is_exact_and_has_no_spare_bit(
    bits: int, rows: int, blocks: int, block: int
) -> None:
    codes = torch.randint(0, 2**bits, (rows, blocks * block), dtype=torch.uint8)
    packed = pack_codes(codes, bits, block)
    assert packed.numel() * 8 == codes.numel() * bits
    assert torch.equal(unpack_codes(packed, bits, block), codes)


def test_128_columns_of_4_bits_are_a_line_of_low_and_high_nibbles() -> None:
    codes = torch.randint(0, 16, (1, 128), dtype=torch.uint8)
    packed = pack_codes(codes, 4, 128)
    assert torch.equal(packed & 15, codes[:, :64])
    assert torch.equal(packed >> 4, codes[:, 64:])


def test_bits_per_weight_are_bits_plus_scales_and_nothing_else() -> None:
    rows, cols = 256, 1024
    for bits in (2, 3, 4, 8):
        plain, zeros = Integer(bits, 128, True), Integer(bits, 128, False)
        assert 8 * plain.nbytes(rows, cols) / (rows * cols) == bits + 16 / 128
        assert 8 * zeros.nbytes(rows, cols) / (rows * cols) == bits + (16 + bits) / 128


CHOICES = (Integer(4, 128), Integer(8, -1), Integer(3, 128), Integer(8, -1, activations="int8"))


@pytest.mark.parametrize(
    ("compiled", "expected"),
    [
        (True, ["cpu", "cpu_exact", "cpu", "cpu"]),
        (False, ["torch_int4", "torch_int8", "reference", "torch_int8"]),
    ],
)
def test_cpu_table_prefers_our_kernels_then_torchs(
    compiled: bool, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(cpu_gemm, "library", lambda: None)
    device = torch.device("cpu")
    assert [kernels.choose(f, 64, 256, device, gather=False).name for f in CHOICES] == expected


INT8 = {"format": "integer", "bits": 8, "group_size": -1}


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"format": "intger"}, ["unknown format 'intger'", "did you mean 'integer'?"]),
        ({"format": "integer", "bit": 4}, ["unknown key 'bit'", "did you mean 'bits'?"]),
        ({"format": "integer", "bits": 5}, ["bits is 5", "2, 3, 4, 8"]),
        ({"format": "integer", "bits": "4"}, ["bits is '4'", "expected int"]),
        ({"format": "integer", "bits": True}, ["bits is True"]),
        ({"format": "integer", "group_size": 100}, ["group_size is 100", "-1, 32, 64, 128"]),
        ({"format": "integer", "activations": "fp8"}, ["activations is 'fp8'"]),
        ({"bits": 4}, ["'format'"]),
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
        (
            {
                "format": "sparse",
                "n": 2,
                "m": 4,
                "values": {"format": "sparse", "n": 2, "m": 4, "values": INT8},
            },
            ["values is sparse itself"],
        ),
    ],
)
def test_bad_parameters_name_the_key(spec: dict[str, object], words: list[str]) -> None:
    with pytest.raises(FormatError) as caught:
        format_from_dict(spec)
    assert all(word in str(caught.value) for word in words)
    assert "\n" not in str(caught.value)


def test_a_cut_between_units_is_refused() -> None:
    fmt = Integer(4, 128)
    stored = fmt.pack(fmt.nearest(torch.randn(8, 256)))
    with pytest.raises(FormatError, match="multiples of 128"):
        fmt.slice(stored, (8, 256), cols=(0, 64))


def test_infinite_scales_of_float16_are_refused() -> None:
    fmt = Integer(4, 32, scale_dtype="float16")
    with pytest.raises(FormatError, match="bfloat16"):
        fmt.pack(fmt.nearest(torch.full((1, 32), 1e9)))
    assert math.isfinite(
        float(
            Integer(4, 32).pack(Integer(4, 32).nearest(torch.full((1, 32), 1e9)))["weight_scales"]
        )
    )
