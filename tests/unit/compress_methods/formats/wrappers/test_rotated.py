"""Rotated matrices: the explicit product, what rotating is for, where they can be cut."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import block_diag, hadamard

from compress_methods.checkpoint.row_order import check_order
from compress_methods.checkpoint.sharding import check_matrix
from compress_methods.errors import FormatError
from compress_methods.formats import Stored
from compress_methods.formats.integer import Integer
from compress_methods.formats.wrappers.rotated import BLOCKS, INPUTS, OUTPUTS, Rotated
from compress_methods.formats.wrappers.smaller_group import group_of, smaller_groups

INT4 = Integer(4, 64)


def lengths(size: int, block: int) -> list[int]:
    """Blocks that a dimension falls into."""
    whole, left = divmod(size, block)
    bits = [1 << i for i in reversed(range(10)) if left >> i & 1]
    return [block] * whole + bits


def explicit(fmt: Rotated, size: int, side: str) -> torch.Tensor:
    """H S of a dimension as a matrix, float64."""
    blocks = [hadamard(n) / n**0.5 for n in lengths(size, fmt.block)]
    signs = fmt.signs(side).double().repeat(-(-size // fmt.block))[:size]
    found: torch.Tensor = torch.from_numpy(block_diag(*blocks)).double() * signs
    return found


@given(
    st.integers(1, 700), st.integers(1, 5), st.sampled_from(BLOCKS), st.integers(0, 3), st.data()
)
def test_the_matrix_is_the_explicit_product(
    rows: int, width: int, block: int, seed: int, data: st.DataObject
) -> None:
    fmt, cols = Rotated(INT4, block, seed), 64 * width
    inputs, outputs = explicit(fmt, cols, INPUTS), explicit(fmt, rows, OUTPUTS)
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows))
    turned = outputs @ weight.double() @ inputs.T
    torch.testing.assert_close(fmt.turn(weight).double(), turned, rtol=1e-5, atol=1e-5)
    stored = fmt.pack(fmt.nearest(weight))
    inner = INT4.unpack(stored).double()
    expected = outputs.T @ inner @ inputs
    torch.testing.assert_close(fmt.unpack(stored).double(), expected, rtol=1e-5, atol=1e-5)
    x = torch.randn(3, cols, generator=torch.Generator().manual_seed(1))
    found = fmt.turn_inputs(x).double()
    torch.testing.assert_close(found, x.double() @ inputs.T, atol=1e-5, rtol=0)


def test_what_is_left_over_is_cut_into_powers_of_two() -> None:
    assert lengths(576, 128) == [128] * 4 + [64]
    fmt = Rotated(Integer(4, 32), 128)
    one = torch.zeros(576)
    one[512] = 1  # of the block of 64 at the end
    turned = fmt.turn_inputs(one)
    assert not turned[:512].any()
    assert torch.equal(turned[512:].abs(), torch.full((64,), 1 / 8))


def test_a_weight_that_sticks_out_no_longer_costs_its_group() -> None:
    weight = torch.randn(128, 256, generator=torch.Generator().manual_seed(0))
    weight[::7, ::31] *= 40
    rest = weight.abs() < 10

    def error(fmt: Integer | Rotated) -> float:
        return float((fmt.matrix(fmt.nearest(weight)) - weight)[rest].square().mean())

    assert error(Rotated(INT4)) < 0.6 * error(INT4)


def test_importance_is_shared_out_inside_blocks() -> None:
    """As the diagonal of the rotated Hessian of inputs that do not go together is."""
    fmt, cols = Rotated(Integer(3, 64), 64), 192
    importance = torch.rand(cols, generator=torch.Generator().manual_seed(3)) ** 4
    weight = torch.randn(32, cols, generator=torch.Generator().manual_seed(4))
    turn = explicit(fmt, cols, INPUTS)
    diagonal = (turn @ importance.double().diag() @ turn.T).diagonal().float()
    expected = fmt.inner.pack(fmt.inner.nearest(fmt.turn(weight), diagonal))
    found = fmt.pack(fmt.nearest(weight, importance))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    plain = fmt.pack(fmt.nearest(weight))
    assert not torch.equal(plain["weight_scales"], found["weight_scales"])


def test_signs_never_change() -> None:
    """Checkpoints hold none, so others would be other matrices."""
    fmt = Rotated(INT4, 128)
    assert fmt.signs(INPUTS)[:12].tolist() == SIGNS[INPUTS]
    assert fmt.signs(OUTPUTS)[:12].tolist() == SIGNS[OUTPUTS]
    assert fmt.signs(INPUTS).tolist() != Rotated(INT4, 128, seed=1).signs(INPUTS).tolist()
    assert 40 < int((fmt.signs(INPUTS) > 0).sum()) < 88


def test_int8_inputs_are_those_of_the_rotated_input() -> None:
    plain, base = Rotated(Integer(8, -1)), Integer(8, -1, activations="int8")
    x = torch.randn(4, 320)
    assert plain.quantize_activations(x) is x
    fmt = Rotated(base)
    treated = fmt.turn_inputs(fmt.quantize_activations(x))
    expected = base.quantize_activations(fmt.turn_inputs(x))
    torch.testing.assert_close(treated, expected, rtol=0, atol=1e-5)
    assert not torch.equal(fmt.quantize_activations(x), base.quantize_activations(x))
    assert fmt.quantize_activations(x.bfloat16()).dtype == torch.bfloat16


def test_cuts_fall_between_blocks() -> None:
    fmt = Rotated(Integer(4, 32), 128)
    assert fmt.alignment(320, 512) == (128, 128)
    assert Rotated(Integer(4, 128, symmetric=False), 64).alignment(320, 512) == (64, 128)
    tensors = fmt.pack(fmt.nearest(torch.randn(320, 512)))
    whole = Stored.whole(fmt, tensors, (320, 512))
    piece = whole.cut(rows=(256, 320), cols=(128, 384))
    assert torch.equal(piece.values(), whole.values()[256:320, 128:384])
    with pytest.raises(FormatError, match=r"cannot cut at \[0, 160\) of 320.*multiples of 128"):
        whole.cut(rows=(0, 160))
    with pytest.raises(FormatError, match=r"cannot cut at \[64, 512\) of 512.*multiples of 128"):
        whole.cut(cols=(64, 512))


def test_tensor_parallelism_that_cuts_a_block_is_refused_in_one_line() -> None:
    fmt = Rotated(Integer(4, 32), 128)
    check_matrix("mlp.down_proj", "blocks", (320, 512), fmt, 4)
    with pytest.raises(FormatError) as caught:
        check_matrix("mlp.down_proj", "blocks", (320, 512), fmt, 8)
    assert str(caught.value) == (
        "mlp.down_proj: 512 columns over tensor-parallel 8 are 64 each, no multiple of 128 "
        "(rotated int4 g32); choose a smaller block or group_size or m"
    )
    with pytest.raises(FormatError, match="320 rows over tensor-parallel 2 are 160 each"):
        check_matrix("mlp.up_proj", "blocks", (320, 512), fmt, 2)
    check_matrix("mlp.down_proj", "blocks", (320, 512), Rotated(Integer(4, 32), 64), 8)


def test_rows_that_vllm_moves_one_by_one_cannot_be_rotated() -> None:
    config = {"model_type": "llama4_text", "hidden_size": 256, "num_attention_heads": 4}
    check_order("self_attn.q_proj", (256, 256), INT4, config)
    with pytest.raises(FormatError, match="vLLM moves its rows while loading"):
        check_order("self_attn.q_proj", (256, 256), Rotated(INT4), config)


def test_groups_become_smaller_where_columns_do_not_fit() -> None:
    fmt = Rotated(Integer(4, 128))
    smaller = next(f for f in smaller_groups(fmt) if 576 % group_of(f) == 0)
    assert smaller == Rotated(Integer(4, 64))
    smaller.check_shape(192, 576)
    with pytest.raises(FormatError, match="group_size 128 does not divide 576 columns"):
        fmt.check_shape(192, 576)


SIGNS = {
    INPUTS: [1, 1, -1, -1, -1, 1, 1, -1, 1, 1, -1, 1],
    OUTPUTS: [-1, -1, -1, -1, -1, 1, -1, -1, -1, 1, -1, 1],
}
