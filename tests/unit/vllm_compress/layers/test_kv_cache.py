"""vLLM's attention layers hold the scales of a checkpoint where their cache is in FP8."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from compress_methods.checkpoint.quantization_config import CompressionSpec
from compress_methods.errors import CheckpointError
from compress_methods.formats.integer import Integer

pytest.importorskip("vllm")

from vllm.model_executor.layers.attention.attention import set_default_quant_scales

from vllm_compress.config import CompressConfig
from vllm_compress.layers.kv_cache import KeptScales

STORED = {"q_scale": 0.25, "k_scale": 0.5, "v_scale": 2.0}


class Layer(nn.Module):
    """What the method asks of vLLM's attention."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kv_cache_dtype = kind
        set_default_quant_scales(self, register_buffer=True)


def loaded(kind: str, stored: dict[str, float]) -> Layer:
    """After vLLM's own renaming, loading and processing."""
    config = CompressConfig(CompressionSpec({"w8": Integer(8, -1)}, [], kv_cache="fp8"))
    layer = Layer(kind)
    method = KeptScales(config, "model.layers.0.self_attn.attn")
    method.create_weights(layer)
    tensors = {f"model.layers.0.self_attn.{n}": torch.tensor([v]) for n, v in stored.items()}
    renamed: dict[str, Tensor] = config.get_cache_scale_mapper().apply_dict(tensors)
    for name, tensor in renamed.items():
        parameter = layer.get_parameter(name.removeprefix("model.layers.0.self_attn.attn."))
        parameter.weight_loader(parameter, tensor)
    method.process_weights_after_loading(layer)
    return layer


def test_a_cache_in_fp8_has_them() -> None:
    layer = loaded("fp8", STORED)
    found = {name: float(getattr(layer, f"_{name}")) for name in STORED}
    assert found == STORED
    assert (layer._k_scale_float, layer._v_scale_float) == (0.5, 2.0)
    assert not list(layer.parameters())


def test_another_cache_has_none() -> None:
    layer = loaded("auto", STORED)
    assert float(layer._k_scale) == float(layer._v_scale) == 1
    assert not list(layer.parameters())


def test_a_scale_that_no_tensor_was_loaded_as_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"self_attn\.attn\.v_scale: no tensor"):
        loaded("fp8", {"q_scale": 0.25, "k_scale": 0.5})


def test_attention_is_asked_for_scales_only_where_there_are_some() -> None:
    from vllm.model_executor.layers.attention import Attention

    attention = Attention.__new__(Attention)
    for kind, expected in (("fp8", KeptScales), (None, type(None))):
        config = CompressConfig(CompressionSpec({"w8": Integer(8, -1)}, [], kv_cache=kind))
        assert type(config.get_quant_method(attention, "model.layers.0.self_attn.attn")) is expected
        assert getattr(config, "kv_cache_scheme", None) is None, "the server chooses"
