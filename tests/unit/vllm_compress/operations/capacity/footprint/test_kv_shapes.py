"""KV bytes per token are those of vLLM, for every kind of attention."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from compress_methods.errors import CheckpointError
from tests.e2e.support.zoo import ZOO
from vllm_compress.operations.capacity.footprint.shapes import read_shape

LATENT = ("deepseek_v2", "deepseek_v3", "minicpm3")
NO_CACHE = ("mamba", "mamba2")
SHAPES = [name for name in ZOO if name not in (*LATENT, *NO_CACHE, "gemma3n")]
assert len(SHAPES) >= 25


def saved(name: str, directory: Path) -> Any:
    """transformers' config of a tiny model, as it is saved."""
    import transformers

    kind, values = ZOO[name]
    config = getattr(transformers, f"{kind}Config")(**values)
    config.save_pretrained(directory)
    return config


@pytest.mark.parametrize("name", SHAPES)
def test_values_per_token_are_those_of_vllm(name: str, tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    import vllm.config  # noqa: F401  (the next import is circular without it)
    from vllm.transformers_utils.model_arch_config_convertor import (
        MODEL_ARCH_CONFIG_CONVERTORS,
        ModelArchConfigConvertorBase,
    )

    config = saved(name, tmp_path)
    convertor = MODEL_ARCH_CONFIG_CONVERTORS.get(config.model_type, ModelArchConfigConvertorBase)
    theirs = convertor(config, config)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    layers = sum("linear" not in k and "conv" not in k for k in kinds)
    shape = read_shape(name, json.loads((tmp_path / "config.json").read_text()), [])
    expected = layers * theirs.get_total_num_kv_heads() * theirs.get_head_size() * 2
    assert shape.kv_layers * shape.kv_values == expected


@pytest.mark.parametrize(
    ("config", "layers", "values"),
    [
        # Numbers by hand, from the published config.json of each.
        (
            {"model_type": "gpt_bigcode", "n_layer": 24, "n_embd": 2048, "n_head": 16},
            24,
            2 * 128,
        ),
        (
            {
                "model_type": "falcon",
                "num_hidden_layers": 32,
                "hidden_size": 4544,
                "num_attention_heads": 71,
                "new_decoder_architecture": False,
                "multi_query": True,
            },
            32,
            2 * 64,
        ),
        (
            {
                "model_type": "falcon",
                "num_hidden_layers": 60,
                "hidden_size": 8192,
                "num_attention_heads": 128,
                "num_kv_heads": 8,
                "new_decoder_architecture": True,
            },
            60,
            2 * 8 * 64,
        ),
        (
            {
                "model_type": "jamba",
                "num_hidden_layers": 32,
                "hidden_size": 4096,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "attn_layer_period": 8,
                "attn_layer_offset": 4,
            },
            4,
            2 * 8 * 128,
        ),
        (
            {
                "model_type": "qwen3_next",
                "num_hidden_layers": 48,
                "hidden_size": 2048,
                "num_attention_heads": 16,
                "num_key_value_heads": 2,
                "head_dim": 256,
            },
            12,
            2 * 2 * 256,
        ),
    ],
    ids=["bigcode-1b", "falcon-7b", "falcon-40b", "jamba", "qwen3-next"],
)
def test_published_models(config: dict[str, Any], layers: int, values: int) -> None:
    shape = read_shape("x", {**config, "vocab_size": 1000, "max_position_embeddings": 2048}, [])
    assert (shape.kv_layers, shape.kv_values) == (layers, values)


@pytest.mark.parametrize("name", NO_CACHE)
def test_models_without_a_kv_cache_are_refused_in_one_line(name: str, tmp_path: Path) -> None:
    saved(name, tmp_path)
    with pytest.raises(CheckpointError, match="no layer keeps a KV cache"):
        read_shape(name, json.loads((tmp_path / "config.json").read_text()), [])
