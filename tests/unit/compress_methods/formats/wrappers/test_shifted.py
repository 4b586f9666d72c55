"""Integers whose groups have offsets mean scale * code + offset, and are multiplied as that."""

from __future__ import annotations

import pytest
import torch

from compress_methods.errors import FormatError
from compress_methods.formats import Stored, format_from_dict
from compress_methods.formats.integer import Integer, IntegerSolution
from compress_methods.formats.lookup import Lookup
from compress_methods.formats.wrappers.shifted import OFFSETS, Shifted, ShiftedSolution
from compress_methods.kernels import Want, matmul, prepare

FORMAT = Shifted(Integer(4, 32, scale_dtype="float16"))
SHAPE = (48, 128)


@pytest.fixture
def stored() -> Stored:
    """Groups that lie on one side of zero, as no symmetric format has them."""
    torch.manual_seed(0)
    codes = torch.randint(0, 16, SHAPE, dtype=torch.uint8)
    scales, offsets = torch.rand(48, 4).half(), torch.randn(48, 4).half() * 5
    solution = ShiftedSolution(IntegerSolution(codes, scales), offsets)
    return Stored.whole(FORMAT, FORMAT.pack(solution), SHAPE)


def test_values_are_scale_times_code_plus_offset(stored: Stored) -> None:
    found = FORMAT.solution(stored.tensors)
    scale, offset = found.base.scales[3, 2].float(), stored.tensors[OFFSETS][3, 2].float()
    assert stored.values()[3, 70] == scale * found.base.codes[3, 70] + offset
    assert format_from_dict(FORMAT.to_dict()) == FORMAT
    assert FORMAT.nbytes(*SHAPE) == 48 * 128 * 5 // 8  # as Q4_1


@pytest.mark.parametrize("kernel", [None, "cpu_exact", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_pieces_are_those_of_their_values(
    kernel: str | None, dtype: torch.dtype, stored: Stored
) -> None:
    for piece in (stored, stored.cut(rows=(8, 24)), stored.cut(cols=(32, 96))):
        rows, cols = piece.size
        x, bias = torch.randn(3, cols).to(dtype), torch.randn(rows)
        found = matmul(x, prepare(piece, Want(kernel=kernel, dtype=dtype)), bias)
        wanted = x.float() @ piece.values().T + bias
        size = x.float().abs() @ piece.values().abs().T
        limit = 1e-5 if kernel and dtype == torch.float32 else 2**-7
        assert found.dtype == dtype
        assert bool(((found.float() - wanted).abs() <= limit * size).all())


def test_the_nearest_reach_from_a_group_s_least_value_to_its_greatest() -> None:
    weight = torch.rand(*SHAPE) + 7
    weight[5] = 3.25  # of one value, which is held exactly
    found = FORMAT.matrix(FORMAT.nearest(weight))
    assert (found - weight).abs().max() < 1 / 15 / 2 + 0.01
    assert torch.equal(found[5], weight[5])


@pytest.mark.parametrize(
    "base", [Integer(4, 32, symmetric=False), Integer(2, 32, levels="mid"), Lookup(4, 32)]
)
def test_only_symmetric_integers_are_a_base(base: Integer | Lookup) -> None:
    with pytest.raises(FormatError, match="expected a symmetric integer format"):
        Shifted(base)
