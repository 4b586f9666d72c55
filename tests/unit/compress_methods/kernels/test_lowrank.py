"""Products with a base plus A B: each part by its own kernel, one operator, pieces of ranks."""

from __future__ import annotations

import pytest
import torch

from compress_methods.formats import Format, Stored
from compress_methods.formats.dense import Dense
from compress_methods.formats.integer import Integer
from compress_methods.formats.wrappers.lowrank import LowRank
from compress_methods.formats.wrappers.rotated import Rotated
from compress_methods.kernels import Want, choose, embed, kernel, matmul, prepare, rebuild
from compress_methods.kernels.cpu import gemm as cpu_gemm
from compress_methods.kernels.cpu.library import Library
from compress_methods.kernels.wrappers.lowrank import FEW

INT4, INT8 = Integer(4, 64), Integer(8, -1)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMATS = [
    LowRank(8, INT4),
    LowRank(32, INT4, INT8),
    LowRank(32, Rotated(INT4, 64), Integer(4, -1)),
    LowRank(24),
    LowRank(32, None, INT8),
]


def stored(fmt: Format, rows: int = 160, cols: int = 320) -> Stored:
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows))
    return Stored.whole(fmt, fmt.pack(fmt.nearest(weight)), (rows, cols))


def close(out: torch.Tensor, x: torch.Tensor, values: torch.Tensor) -> bool:
    exact = x.double() @ values.double().T
    limit = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[out.dtype]
    return float((out.double() - exact).norm()) < limit * float(exact.norm())


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.describe())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(160, 320), (77, 64)])
def test_products_are_those_of_the_values(
    isa: Library, fmt: LowRank, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    """Of few tokens in one call, of many by torch; also where inputs lie apart."""
    matrix, (rows, cols) = stored(fmt, *shape), shape
    prepared = prepare(matrix, Want(kernel="cpu_exact", dtype=dtype))
    bias = torch.arange(rows).to(dtype) / rows
    for tokens in (1, FEW, FEW + 1):
        wide = torch.randn(tokens, 2 * cols, generator=torch.Generator().manual_seed(tokens))
        for x in (wide.to(dtype)[:, :cols], wide.to(dtype)[:, ::2]):
            found = matmul(x, prepared, bias)
            assert (found.dtype, found.shape) == (dtype, (tokens, rows))
            assert close(found - bias, x, matrix.values())
        assert torch.equal(found, matmul(x, rebuild(prepared.text(), prepared.flat()), bias))


@pytest.mark.parametrize("tokens", [1, FEW])
def test_one_call_is_the_bases_product_and_the_factors(isa: Library, tokens: int) -> None:
    """Threads change nothing, and activations of the base are those that it has alone."""
    matrix = stored(LowRank(33, Integer(2, 128, levels="mid"), Dense("float32")), 500, 640)
    base = prepare(matrix.nested(matrix.format.base), Want(kernel="cpu"))  # type: ignore[attr-defined]
    prepared = prepare(matrix, Want(kernel="cpu"))
    x, outs, before = torch.randn(tokens, 640), [], torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            outs.append(matmul(x, prepared))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*outs)
    left, right = prepared.tensors
    torch.testing.assert_close(outs[0], matmul(x, base) + x @ right.T @ left, rtol=1e-4, atol=1e-3)


def test_factors_that_do_not_fit_are_refused_in_one_line(isa: Library) -> None:
    prepared = prepare(stored(LowRank(8, INT4)), Want(kernel="cpu"))
    operator = kernel("cpu").corrected(prepared.parts[0])
    assert operator is not None
    left, right, *base = prepared.flat()
    x = torch.randn(1, 320)
    for words, a, b in (
        ("factors are of two dtypes", left.bfloat16(), right),
        ("factors are not those of 160 rows and 320 columns", left[:, :-1].contiguous(), right),
        ("factors are not those of 160 rows and 320 columns", left[:4], right),
        ("factors are not those of 160 rows and 320 columns", left, right[:, :64].contiguous()),
        ("factors are not contiguous", left[:, ::2], right),
        ("factors are neither", left.double(), right.double()),
        ("factors have 1 dim", left[0], right),
    ):
        with pytest.raises(RuntimeError, match=words):
            operator.function(x, None, *operator.settings, a, b, *base)


@pytest.mark.parametrize("base", [INT4, None])
def test_other_kernels_of_the_base_have_an_operator_too(
    base: Integer | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As vLLM's kernels on GPUs are."""
    prepared = prepare(stored(LowRank(8, base)), Want(kernel="cpu_exact"))
    x, bias = torch.randn(3, 320), torch.randn(160)
    expected = matmul(x, prepared, bias)
    assert (kernel("lowrank").operator(prepared) is None) == (base is not None)
    monkeypatch.setattr(cpu_gemm.CpuGemm, "corrected", lambda *_: None)
    operator = kernel("lowrank").operator(prepared)
    assert operator is not None
    found = operator.function(x, bias, *operator.settings, *prepared.flat())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    assert torch.equal(found, matmul(x, prepared, bias))
    monkeypatch.setattr(cpu_gemm.CpuGemm, "operator", lambda *_: None)
    assert (kernel("lowrank").operator(prepared) is None) == (base is not None)


@pytest.mark.parametrize("fmt", FORMATS[:3], ids=lambda fmt: fmt.describe())
def test_shares_of_two_ranks_are_the_product(fmt: LowRank) -> None:
    """Of columns their sum, of rows their outputs side by side."""
    matrix, x = stored(fmt, 128, 256), torch.randn(5, 256)
    want = Want(kernel="cpu_exact")
    whole = matmul(x, prepare(matrix, want))
    cols = [(0, 128), (128, 256)]
    shares = [matmul(x[:, slice(*c)], prepare(matrix.cut(cols=c), want)) for c in cols]
    torch.testing.assert_close(sum(shares), whole, rtol=1e-4, atol=1e-3)
    rows = [matmul(x, prepare(matrix.cut(rows=r), want)) for r in [(0, 64), (64, 128)]]
    torch.testing.assert_close(torch.cat(rows, -1), whole, rtol=1e-4, atol=1e-3)


def test_the_base_has_a_kernel_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    want = Want(dtype=torch.bfloat16, kernel="cpu_exact")
    prepared = prepare(stored(LowRank(32, INT4, INT8)), want)
    assert [part.kernel for part in prepared.parts] == ["cpu_exact"]
    assert [t.dtype for t in prepared.tensors] == [torch.bfloat16] * 2
    monkeypatch.setattr(cpu_gemm, "library", lambda: None)
    matrix = stored(LowRank(32, INT4, Integer(4, -1)))
    prepared = prepare(matrix, Want(dtype=torch.bfloat16))
    assert [part.kernel for part in prepared.parts] == ["torch_int4"]
    x = torch.randn(3, 320).bfloat16()
    assert close(matmul(x, prepared), x, matrix.values())


def test_int8_inputs_are_multiplied_by_both() -> None:
    fmt = LowRank(8, Integer(8, -1, activations="int8"), Dense("float32"))
    matrix, x = stored(fmt), torch.randn(4, 320)
    found = matmul(x, prepare(matrix, Want(kernel="cpu")))
    expected = fmt.quantize_activations(x) @ matrix.values().T
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def test_what_the_table_chooses() -> None:
    matrix = stored(LowRank(8, INT4))
    assert choose(matrix).name == "lowrank"
    assert choose(matrix, Want(kernel="reference")).name == "reference"
    found = embed(torch.tensor([7, 0]), prepare(matrix, Want(embed=True)), torch.float32)
    torch.testing.assert_close(found, matrix.values()[[7, 0]], rtol=1e-6, atol=0)
