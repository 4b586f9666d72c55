"""Products with a base plus A B: each part by its own kernel, one operator, pieces of ranks."""

from __future__ import annotations

import pytest
import torch

from compress_methods.formats import Format, Stored
from compress_methods.formats.dense import Dense
from compress_methods.formats.integer import Integer
from compress_methods.formats.lowrank import LowRank
from compress_methods.formats.rotated import Rotated
from compress_methods.kernels import Want, choose, embed, kernel, matmul, prepare, rebuild
from compress_methods.kernels.cpu import gemm as cpu_gemm

INT4, INT8 = Integer(4, 64), Integer(8, -1)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMATS = [
    LowRank(8, INT4),
    LowRank(64, INT4, INT8),
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
def test_one_operator_does_what_the_parts_do(fmt: LowRank, dtype: torch.dtype) -> None:
    matrix = stored(fmt)
    prepared = prepare(matrix, Want(kernel="cpu_exact", dtype=dtype))
    operator = kernel("lowrank").operator(prepared)
    assert operator is not None
    for tokens in (1, 3, 40):
        x = torch.randn(tokens, 320, generator=torch.Generator().manual_seed(tokens)).to(dtype)
        bias = torch.arange(160).to(dtype)
        found = operator.function(x, bias, *operator.settings, *prepared.flat())
        assert (found.dtype, found.shape) == (dtype, (tokens, 160))
        assert torch.equal(found, matmul(x, prepared, bias))
        assert torch.equal(found, matmul(x, rebuild(prepared.text(), prepared.flat()), bias))
        assert close(matmul(x, prepared), x, matrix.values())


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


def test_every_part_has_a_kernel_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [part.kernel for part in prepare(stored(LowRank(32, INT4, INT8))).parts]
    assert names == ["cpu_exact", "cpu_exact", "cpu"]
    assert [part.kernel for part in prepare(stored(LowRank(8, INT4))).parts[:2]] == ["dense"] * 2
    monkeypatch.setattr(cpu_gemm, "library", lambda: None)
    matrix = stored(LowRank(32, INT4, Integer(4, -1)))
    prepared = prepare(matrix, Want(dtype=torch.bfloat16))
    assert [part.kernel for part in prepared.parts] == ["dense", "dense", "torch_int4"]
    assert [t.dtype for part in prepared.parts[:2] for t in part.tensors] == [torch.bfloat16] * 2
    x = torch.randn(3, 320).bfloat16()
    assert close(matmul(x, prepared), x, matrix.values())
    assert kernel("lowrank").operator(prepared) is None


def test_int8_inputs_are_multiplied_by_both() -> None:
    matrix = stored(LowRank(8, Integer(8, -1, activations="int8"), Dense("float32")))
    x = torch.randn(4, 320)
    expected = matrix.format.quantize_activations(x) @ matrix.values().T
    torch.testing.assert_close(matmul(x, prepare(matrix)), expected, rtol=1e-4, atol=1e-3)


def test_what_the_table_chooses() -> None:
    matrix = stored(LowRank(8, INT4))
    assert choose(matrix).name == "lowrank"
    assert choose(matrix, Want(kernel="reference")).name == "reference"
    found = embed(torch.tensor([7, 0]), prepare(matrix, Want(embed=True)), torch.float32)
    torch.testing.assert_close(found, matrix.values()[[7, 0]], rtol=1e-6, atol=0)
