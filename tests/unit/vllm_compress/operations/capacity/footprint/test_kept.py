"""States that hybrids keep for each sequence have the bytes of vLLM's own."""

from __future__ import annotations

import json
from importlib import import_module
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from compress_methods.errors import CheckpointError
from tests.e2e.support.zoo import ZOO
from vllm_compress.operations.capacity.footprint.kept import State, state_of
from vllm_compress.operations.capacity.footprint.shapes import read_shape

FALCON = {"mamba_d_ssm": 1536, "mamba_n_heads": 24, "mamba_d_head": 64}
HYBRIDS: dict[str, tuple[str, dict[str, Any], int]] = {
    "jamba": ("Jamba", {}, 28),
    "falcon_h1": ("FalconH1", FALCON, 32),
    "qwen3_next": ("Qwen3Next", {}, 36),
    "granitemoehybrid": ("GraniteMoeHybrid", {"layer_types": ["mamba", "attention"] * 16}, 16),
    "zamba2": ("Zamba2", {}, 54),
    "nemotron_h": ("NemotronH", {"layers_block_type": ["mamba", "mlp", "attention"]}, 1),
    "olmo_hybrid": ("OlmoHybrid", {}, 24),
    "lfm2": ("Lfm2", {"layer_types": ["conv"] * 24 + ["full_attention"] * 8}, 24),
}
"""Models by vLLM's module, with transformers' name, settings and layers that keep a state."""


@pytest.mark.slow
@pytest.mark.parametrize("name", HYBRIDS)
def test_states_have_the_bytes_of_vllm(name: str, tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    import torch
    import transformers
    import vllm.config  # noqa: F401  (the next import is circular without it)

    kind, values, layers = HYBRIDS[name]
    config: Any = getattr(transformers, f"{kind}Config")(**values)
    config.save_pretrained(tmp_path)
    found = state_of(json.loads((tmp_path / "config.json").read_text()), config.num_hidden_layers)
    assert found is not None
    assert found.layers == layers
    if name == "lfm2":
        config.conv_dim = config.hidden_size  # which transformers no longer writes
    theirs = getattr(import_module(f"vllm.model_executor.models.{name}"), f"{kind}ForCausalLM")
    heads = "float32" if name == "nemotron_h" else "auto"  # as its class in vLLM's config.py
    for tp in (1, 2):
        asked = SimpleNamespace(
            parallel_config=SimpleNamespace(tensor_parallel_size=tp),
            model_config=SimpleNamespace(
                hf_config=config, hf_text_config=config, dtype=torch.bfloat16
            ),
            cache_config=SimpleNamespace(
                mamba_cache_dtype="auto", mamba_ssm_cache_dtype=heads, use_replayssm=False
            ),
            num_speculative_tokens=0,
            speculative_config=None,
        )
        shapes = theirs.get_mamba_state_shape_from_config(asked)
        dtypes = theirs.get_mamba_state_dtype_from_config(asked)
        wanted = sum(prod(s) * d.itemsize for s, d in zip(shapes, dtypes, strict=True))
        assert found.rank_bytes(tp) == wanted


def test_published_qwen3_next_keeps_a_state_in_three_of_four_layers() -> None:
    """Numbers by hand, from its config.json."""
    text = {
        "model_type": "qwen3_next", "num_hidden_layers": 48, "hidden_size": 2048,
        "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128,
        "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4,
    }  # fmt: skip
    found = state_of(text, 48)
    assert found == State(36, 4, 2 * 16 * 128 + 32 * 128, heads=32, head=128 * 128)
    assert found.rank_bytes(1) == 2 * (8192 * 3 + 32 * 128 * 128)


@pytest.mark.parametrize("name", ["llama", "gemma3", "deepseek_v3"])
def test_models_without_states_have_none(name: str, tmp_path: Path) -> None:
    import transformers

    kind, values = ZOO[name]
    getattr(transformers, f"{kind}Config")(**values).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert read_shape(name, config, []).state is None


def test_a_pattern_tells_mamba_from_plain_layers() -> None:
    text = {
        "model_type": "nemotron_h", "hybrid_override_pattern": "M-M*-M-", "hidden_size": 64,
        "mamba_num_heads": 4, "mamba_head_dim": 32, "n_groups": 2, "ssm_state_size": 16,
        "conv_kernel": 4,
    }  # fmt: skip
    assert state_of(text, 7) == State(3, 4, 128, 2, 16, 4, 32 * 16, head_bytes=4)
    with pytest.raises(CheckpointError, match="no layer keeps a KV cache"):
        read_shape(
            "x", {**text, "hybrid_override_pattern": "M-", "num_hidden_layers": 2,
                  "num_attention_heads": 4, "vocab_size": 9}, []
        )  # fmt: skip
