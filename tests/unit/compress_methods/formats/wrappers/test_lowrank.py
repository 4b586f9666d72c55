"""A B added to what a base holds: the best there is, exact bytes, where it can be cut."""

from __future__ import annotations

import pytest
import torch

from compress_methods.checkpoint.row_order import check_order
from compress_methods.checkpoint.sharding import check_matrix
from compress_methods.errors import FormatError
from compress_methods.formats import Format, Stored
from compress_methods.formats.dense import Dense
from compress_methods.formats.fitting.principal import principal
from compress_methods.formats.integer import Integer
from compress_methods.formats.wrappers.lowrank import LowRank
from compress_methods.formats.wrappers.rotated import Rotated
from compress_methods.formats.wrappers.smaller_group import smaller_groups
from tests.unit.compress_methods.formats.test_stored import Product

INT2, INT4, INT8 = Integer(2, 64), Integer(4, 64), Integer(8, -1)
FULL = Dense("float32")


def drawn(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


def whitened(matrix: torch.Tensor, rank: int, hessian: torch.Tensor) -> torch.Tensor:
    """The best matrix of a rank by the book: SVD of M L, its right factor times L^-1. float64."""
    lower = torch.linalg.cholesky(hessian.double())
    u, s, v = torch.linalg.svd(matrix.double() @ lower, full_matrices=False)
    best = (u * s)[:, :rank] @ v[:rank]
    return torch.linalg.solve_triangular(lower, best, upper=False, left=False)


def lost(error: torch.Tensor, hessian: torch.Tensor) -> float:
    return float(torch.linalg.vecdot(error.double() @ hessian.double(), error.double()).sum())


@pytest.mark.parametrize(("rows", "cols"), [(30, 96), (96, 30), (300, 128), (128, 300)])
@pytest.mark.parametrize("rank", [1, 4, 16])
def test_nothing_of_that_rank_is_closer(rows: int, cols: int, rank: int) -> None:
    """Of flat spectra, too, which are the hardest to iterate on."""
    x = drawn(2 * cols, cols, 1) @ drawn(cols, cols, 2) * torch.logspace(-1, 1, cols)
    hessian, matrix = x.T @ x / len(x), drawn(rows, cols, 3)
    fmt = LowRank(rank, None, FULL)
    for metric, full in ((None, torch.eye(cols)), (hessian, hessian)):
        found = fmt.matrix(fmt.correct(None, matrix, metric))
        best = lost(matrix - whitened(matrix, rank, full), full)
        assert best * (1 - 1e-5) <= lost(matrix - found, full) <= best * 1.01
    diagonal = hessian.diagonal()
    by_diagonal = fmt.matrix(fmt.nearest(matrix, diagonal))
    best = lost(matrix - whitened(matrix, rank, diagonal.diag()), diagonal.diag())
    assert lost(matrix - by_diagonal, diagonal.diag()) <= best * 1.01


def test_a_hessian_of_few_tokens_needs_no_inverse() -> None:
    """Inputs that were never active have no share in any direction."""
    x = drawn(7, 64)
    x[:, 20:] = 0
    matrix = drawn(40, 64, 1)
    fmt = LowRank(8, None, FULL)
    found = fmt.matrix(fmt.correct(None, matrix, x.T @ x))
    assert lost(matrix - found, x.T @ x) < 1e-7 * lost(matrix, x.T @ x)


@pytest.mark.parametrize("size", [1e-18, 1.0, 1e18])
def test_directions_have_length_one_whatever_the_size(size: float) -> None:
    found = principal(drawn(100, 64) * size, 6)
    torch.testing.assert_close(found.T @ found, torch.eye(6), atol=1e-5, rtol=0)
    assert not principal(torch.zeros(3, 64), 6)[:, 3:].any()


def test_nothing_left_is_corrected_by_nothing() -> None:
    fmt = LowRank(8, INT4)
    base = INT4.nearest(drawn(40, 128))
    found = fmt.correct(base, torch.zeros(40, 128))
    assert torch.equal(fmt.matrix(found), INT4.matrix(base))
    assert torch.equal(fmt.solution(fmt.pack(found)).left, found.left.bfloat16())


@pytest.mark.parametrize("factors", [Dense(), Integer(8, -1), Integer(4, 32)])
def test_stored_factors_correct_nearly_as_well_as_exact_ones(factors: Format) -> None:
    weight = drawn(200, 256) + 3 * drawn(200, 4, 1) @ drawn(4, 256, 2)

    def error(fmt: Format) -> float:
        return float((fmt.matrix(fmt.nearest(weight)) - weight).square().sum())

    stored, exact = error(LowRank(32, INT2, factors)), error(LowRank(32, INT2, FULL))
    limit = {Dense(): 1.001, Integer(8, -1): 1.001}.get(factors, 1.05)
    assert exact * (1 - 1e-6) <= stored < limit * exact
    assert exact < 0.75 * error(INT2)


@pytest.mark.parametrize(
    ("fmt", "more"),
    [
        (LowRank(16, INT4), 2 * 16 * (300 + 512)),
        (LowRank(32, INT4, INT8), 32 * (300 + 512) + 2 * (300 + 32)),
        (LowRank(32, INT4, Integer(4, -1)), 16 * (300 + 512) + 2 * (300 + 32)),
        (LowRank(16), 2 * 16 * (300 + 512)),
    ],
)
def test_bytes_are_those_of_the_base_and_the_factors(fmt: LowRank, more: int) -> None:
    base = 0 if fmt.base is None else fmt.base.nbytes(300, 512)
    assert fmt.nbytes(300, 512) == base + more


def test_what_it_is_called() -> None:
    assert LowRank(16, Rotated(INT4)).describe() == "rotated int4 g64 + rank 16"
    assert LowRank(32, INT4, INT8).describe() == "int4 g64 + rank 32 int8 row"
    assert LowRank(32).describe() == "rank 32"


def test_a_rank_cuts_a_where_it_cuts_rows_and_b_where_it_cuts_columns() -> None:
    fmt = LowRank(32, INT4, INT8)
    weight = drawn(96, 256)
    whole = Stored.whole(fmt, fmt.pack(fmt.nearest(weight)), (96, 256))
    rows, cols = whole.cut(rows=(32, 64)), whole.cut(cols=(128, 256))
    assert rows.tensors["weight_left"].shape == (32, 32)
    assert rows.tensors["weight_left_scales"].shape == (32, 1)
    assert rows.tensors["weight_right"] is whole.tensors["weight_right"]
    assert cols.tensors["weight_left"] is whole.tensors["weight_left"]
    assert cols.tensors["weight_right"].shape == (32, 128)
    assert cols.tensors["weight_right_scales"] is whole.tensors["weight_right_scales"]
    for piece in (rows, cols, rows.cut(cols=(64, 192))):
        left, right = fmt.left(piece).values(), fmt.right(piece).values()
        base = piece.nested(INT4).values()
        expected = whole.values()[slice(*piece.rows), slice(*piece.cols)]
        torch.testing.assert_close(base + left @ right, expected, rtol=1e-5, atol=1e-6)
    assert fmt.alignment(96, 256) == (1, 64)
    assert LowRank(32, INT2, Integer(4, -1)).alignment(96, 256) == (1, 64)
    assert LowRank(8).alignment(96, 256) == (1, 1)


def test_shapes_that_cannot_be_held_are_refused_in_one_line() -> None:
    fmt = LowRank(64, Integer(4, 128))
    fmt.check_shape(64, 256)
    with pytest.raises(FormatError, match="rank 64 of a matrix of 48 rows and 256 columns"):
        fmt.check_shape(48, 256)
    with pytest.raises(FormatError, match="group_size 128 does not divide 320 columns"):
        fmt.check_shape(64, 320)
    assert next(smaller_groups(fmt)) == LowRank(64, Integer(4, 64))
    with pytest.raises(FormatError, match="256 columns over tensor-parallel 8 are 32 each"):
        check_matrix("mlp.down_proj", "blocks", (64, 256), LowRank(8, INT4), 8)
    with pytest.raises(FormatError, match="test-product, whose tensors cannot be cut"):
        LowRank(8, Product()).tensors(64, 256)


def test_rows_that_vllm_moves_one_by_one_are_refused() -> None:
    """It would move those of B too."""
    config = {"model_type": "llama4_text", "hidden_size": 256, "num_attention_heads": 4}
    with pytest.raises(FormatError, match="vLLM moves its rows while loading"):
        check_order("self_attn.q_proj", (256, 256), LowRank(8, INT4), config)


def test_int8_inputs_are_those_of_the_base() -> None:
    base, x = Integer(8, -1, activations="int8"), drawn(3, 64)
    assert torch.equal(LowRank(4, base).quantize_activations(x), base.quantize_activations(x))
    assert LowRank(4).quantize_activations(x) is x
