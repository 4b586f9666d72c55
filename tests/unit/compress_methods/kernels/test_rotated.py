"""Products with rotated matrices: by whichever kernel the base has, in one operator on CPUs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress_methods.formats import Format, Stored
from compress_methods.formats.integer import Integer
from compress_methods.formats.wrappers.rotated import BLOCKS, Rotated
from compress_methods.kernels import Want, choose, embed, kernel, matmul, prepare
from compress_methods.kernels.cpu import gemm as cpu_gemm
from tests.unit.compress_methods.kernels.arithmetic import interpret

INT4 = Integer(4, 64)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def stored(fmt: Format, rows: int, cols: int) -> Stored:
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows))
    return Stored.whole(fmt, fmt.pack(fmt.nearest(weight)), (rows, cols))


def close(out: torch.Tensor, x: torch.Tensor, values: torch.Tensor, bias: torch.Tensor) -> bool:
    """Whether the product is exact but for the rounding of its dtype."""
    exact = x.double() @ values.double().T + bias.double()
    scale = x.double().norm(dim=1, keepdim=True) * values.double().norm(dim=1).max()
    tolerance = {torch.float32: 2**-18, torch.bfloat16: 2**-7, torch.float16: 2**-10}[out.dtype]
    return bool(((out.double() - exact).abs() <= tolerance * (scale + bias.abs())).all())


@pytest.mark.usefixtures("isa")
def test_one_operator_gives_the_values_products() -> None:
    """Exact activations, so that nothing but float32 is between it and the values."""

    @settings(max_examples=60)
    @given(
        st.sampled_from(BLOCKS),
        st.integers(1, 600),
        st.integers(1, 9),
        st.sampled_from((1, 2, 7, 33)),
        st.sampled_from(DTYPES),
    )
    def check(block: int, rows: int, width: int, tokens: int, dtype: torch.dtype) -> None:
        cols = 64 * width
        matrix = stored(Rotated(INT4, block), rows, cols)
        prepared = prepare(matrix, Want(kernel="cpu_exact"))
        assert [part.kernel for part in prepared.parts] == ["cpu_exact"]
        wide = torch.randn(tokens, 2 * cols, generator=torch.Generator().manual_seed(width))
        x, bias = wide.to(dtype)[:, ::2], torch.randn(rows).to(dtype)
        operator = kernel("rotated").operator(prepared)
        assert operator is not None
        out = operator.function(x, bias, *operator.settings, *prepared.flat())
        assert (out.dtype, out.shape) == (dtype, (tokens, rows))
        assert close(out, x, matrix.values(), bias)
        assert torch.equal(out, matmul(x, prepared, bias))

    check()


@pytest.mark.usefixtures("isa")
def test_many_tokens_are_those_of_smaller_calls() -> None:
    """Rotated activations are held for some tokens at a time."""
    prepared = prepare(stored(Rotated(INT4), 20, 8192), Want(kernel="cpu"))
    x = torch.randn(1100, 8192)
    assert 1100 * 8212 > 2**23
    pieces = torch.cat([matmul(part, prepared) for part in x.split(400)])
    assert torch.equal(matmul(x, prepared), pieces)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("tokens", [1, 50])
def test_threads_change_nothing(tokens: int) -> None:
    prepared = prepare(stored(Rotated(INT4), 500, 640), Want(kernel="cpu"))
    x, outs, before = torch.randn(tokens, 640), [], torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            outs.append(matmul(x, prepared))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*outs)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_spoils_its_own_token_only(bad: float) -> None:
    prepared = prepare(stored(Rotated(INT4), 20, 256), Want(kernel="cpu"))
    x = torch.randn(5, 256)
    clean = matmul(x, prepared)
    x[3, 130] = bad
    out = matmul(x, prepared)
    assert not out[3].isfinite().any()
    rest = [0, 1, 2, 4]
    assert torch.equal(out[rest], clean[rest])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("base", "name"),
    [
        (Integer(4, 64), "torch_int4"),
        (Integer(8, -1), "torch_int8"),
        (Integer(4, 64), "reference"),
        (Integer(8, -1, activations="int8"), "torch_int8"),
    ],
)
def test_other_kernels_of_the_base_have_the_transforms_around_them(
    base: Integer, name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    fmt = Rotated(base, 128)
    matrix = stored(fmt, 160, 320)
    monkeypatch.setattr(cpu_gemm, "library", lambda: None)
    prepared = prepare(matrix, Want(kernel="rotated"))
    if name == "reference":
        part = prepare(matrix.nested(base), Want(kernel=name))
        prepared = replace(prepared, parts=(part,))
    assert [part.kernel for part in prepared.parts] == [name]
    x, bias = torch.randn(2, 5, 320).to(dtype), torch.randn(160).to(dtype)
    out = matmul(x, prepared, bias)
    assert (out.dtype, out.shape) == (dtype, (2, 5, 160))
    inputs = fmt.quantize_activations(x.float()).flatten(0, 1)
    rounded = out if base.bits == 8 or name == "reference" else out.bfloat16()
    if base.bits == 8:  # torch's kernel rounds inputs to bfloat16 whatever they were
        rounded = out.bfloat16()
    assert close(rounded.flatten(0, 1), inputs, matrix.values(), bias)


def test_an_operator_of_the_base_is_called_between_the_transforms(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As vLLM's kernels on GPUs are, which own their tensors."""
    prepared = prepare(stored(Rotated(INT4), 160, 320), Want(kernel="cpu_exact"))
    x, bias = torch.randn(3, 320), torch.randn(160)
    expected = matmul(x, prepared, bias)
    monkeypatch.setattr(cpu_gemm.CpuGemm, "rotated", lambda *_: None)
    operator = kernel("rotated").operator(prepared)
    assert operator is not None
    for own in (bias, None):
        out = operator.function(x, own, *operator.settings, *prepared.flat())
        wanted = expected - (0 if own is not None else bias)
        torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-3)
    monkeypatch.setattr(cpu_gemm.CpuGemm, "operator", lambda *_: None)
    assert kernel("rotated").operator(prepared) is None
    torch.testing.assert_close(matmul(x, prepared, bias), expected, rtol=1e-4, atol=1e-3)


def test_what_the_table_chooses() -> None:
    matrix = stored(Rotated(INT4), 160, 320)
    assert choose(matrix).name == "rotated"
    assert prepare(matrix, Want(kernel="cpu_exact")).parts[0].kernel == "cpu_exact"
    assert choose(matrix, Want(kernel="reference")).name == "reference"
    assert choose(matrix, Want(embed=True)).name == "reference"


@pytest.mark.parametrize("rows", [100, 128, 200, 320])
def test_rows_of_a_rotated_matrix_are_looked_up_by_their_blocks(rows: int) -> None:
    """The last block is smaller than others."""
    matrix = stored(Rotated(INT4), rows, 128)
    prepared = prepare(matrix, Want(embed=True))
    for ids in ([rows - 1], [0, rows - 1, rows // 2], [5]):
        found = embed(torch.tensor(ids), prepared, torch.float32)
        torch.testing.assert_close(found, matrix.values()[ids], rtol=1e-6, atol=0)


IN_TRITON = """
import torch
from compress_methods.kernels.wrappers.rotated import turn_in_torch
from compress_methods.kernels.triton.hadamard import turn
torch.manual_seed(0)
for block, sizes in ((32, (8, 100)), (128, (320,))):
    signs = 1 - 2.0 * torch.randint(2, (block,))
    for size in sizes:
        for dtype in (torch.float32, torch.float16):  # products of bfloat16 are beyond it
            x = torch.randn(2, 9, size).to(dtype)
            for back in (False, True):
                found, expected = turn(x, signs, back), turn_in_torch(x, signs, back)
                assert (found.dtype, found.shape) == (dtype, x.shape)
                limit = {4: 1e-5, 2: 2**-7}[dtype.itemsize] * float(expected.abs().max())
                assert float((found - expected).abs().max()) < limit, (block, size, dtype, back)
print("the same")
"""


@pytest.mark.slow
@pytest.mark.parametrize("pointer", ["*bf16", "*fp32"])
def test_the_triton_kernel_compiles_for_a_gpu(pointer: str) -> None:
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from compress_methods.kernels.triton.hadamard import ROWS, turn_block

    numbers = dict.fromkeys(("rows", "stride", "first", "sign"), "i32")
    constants = {"BACK": False, "SIZE": 128, "WIDTH": 128, "ROWS": ROWS}
    signature = {"x": pointer, "out": pointer, "signs": "*fp32", **numbers}
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=turn_block, signature=signature, constexprs=constants)
    made = triton.compile(source, target=GPUTarget("cuda", 80, 32))
    assert ("mma.sync" in made.asm["ptx"]) == (pointer == "*bf16")


def test_triton_turns_as_torch_does() -> None:
    """In Triton's interpreter, which needs no GPU; tests/gpu has the compiled one."""
    interpret(IN_TRITON)
