"""Rows that vLLM's model classes move while loading: ours end where the dense weight's would."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from compress_methods.checkpoint.row_order import check_order
from compress_methods.errors import FormatError
from compress_methods.formats import Format, TensorSpec
from compress_methods.formats.integer import Integer
from compress_methods.model.architecture import ROTARY_HALVES, WHOLE_HEADS, architecture_of

pytest.importorskip("vllm")

from vllm_compress.layers import row_order

LLAMA4 = {"model_type": "llama4_text", "head_dim": 32, "num_attention_heads": 4}
FALCON = {"model_type": "falcon", "hidden_size": 128, "num_attention_heads": 4}


@dataclass(frozen=True)
class Codebook(Format):
    """A format whose second tensor has no rows."""

    name: ClassVar[str] = "codebook"

    def tensors(self, rows: int, cols: int) -> dict[str, TensorSpec]:
        main = Integer(bits=8, group_size=-1).tensors(rows, cols)["weight_packed"]
        return {"weight_packed": main, "weight_book": TensorSpec((rows, 4), "float32")}

    def pack(self, solution: Any) -> dict[str, Tensor]:
        raise NotImplementedError

    solution = matrix = pack  # type: ignore[assignment]


def vllm_moves(name: str, tensor: Tensor) -> Tensor:
    """What vLLM's Llama-4 hands to a parameter's loader."""
    from vllm.model_executor.models.llama4 import Llama4ForCausalLM

    config = SimpleNamespace(num_attention_heads=4, num_key_value_heads=2)
    moved = Llama4ForCausalLM.permute_qk_weight_for_rotary(
        SimpleNamespace(config=config), name, tensor
    )
    return moved[1]


@pytest.mark.parametrize("fmt", [Integer(bits=4, group_size=32), Integer(bits=8, group_size=-1)])
def test_llama4_unpacks_to_the_dense_weight_as_vllm_moves_it(fmt: Integer) -> None:
    torch.manual_seed(0)
    stored = fmt.pack(fmt.nearest(torch.randn(128, 64) * torch.rand(128, 1)))
    expected = vllm_moves("layers.0.self_attn.q_proj.weight", fmt.unpack(stored))
    loaded = {
        name: row_order.finish(name, vllm_moves(f"q_proj.{name}", tensor), ROTARY_HALVES, 32)
        for name, tensor in stored.items()
    }
    assert torch.equal(fmt.unpack(loaded), expected)


def test_falcon_finds_the_attribute_it_moves_heads_by() -> None:
    parameter = Parameter(torch.empty(0), requires_grad=False)
    row_order.mark(parameter, None)
    assert not hasattr(parameter, "output_dim")
    row_order.mark(parameter, WHOLE_HEADS)
    assert parameter.output_dim == 0


def test_formats_whose_rows_cannot_be_moved_are_refused() -> None:
    odd = Integer(bits=4, group_size=32, symmetric=False)
    check_order("q_proj", (128, 64), Integer(bits=4, group_size=32), LLAMA4)
    check_order("x.query_key_value", (384, 128), odd, FALCON)
    with pytest.raises(FormatError, match="weight_zeros"):
        check_order("layers.0.q_proj", (128, 64), odd, LLAMA4)
    with pytest.raises(FormatError, match="weight_book"):
        check_order("x.query_key_value", (384, 128), Codebook(), FALCON)
    check_order("vision_model.layers.0.q_proj", (128, 64), odd, LLAMA4)
    check_order("x.dense", (128, 128), Codebook(), FALCON)


def test_architectures_that_move_rows_have_a_row() -> None:
    assert architecture_of(FALCON).moved_rows == {"query_key_value": WHOLE_HEADS}
    assert architecture_of({"model_type": "bloom"}).moved_rows == {"query_key_value": WHOLE_HEADS}
    assert architecture_of(LLAMA4).moved_rows["k_proj"] == ROTARY_HALVES
