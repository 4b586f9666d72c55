"""Checkpoints for end-to-end tests: random models of many architectures, compressed in seconds,
and what transformers computes with the values that are stored."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

VOCABULARY = 512
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "initializer_range": 0.1,
}
TIED_LLAMA: dict[str, Any] = {**SMALL, "tie_word_embeddings": True}
MODELS: dict[str, dict[str, Any]] = {
    "Llama": {**SMALL, "tie_word_embeddings": False},
    "Qwen2": {**SMALL, "tie_word_embeddings": True},
    "Qwen3": {**SMALL, "tie_word_embeddings": False},
    "Mistral": {**SMALL, "tie_word_embeddings": False, "sliding_window": None},
    "Gemma3Text": {
        **SMALL,
        "tie_word_embeddings": True,
        "num_key_value_heads": 1,
        "query_pre_attn_scalar": 32,
        "sliding_window": 64,
    },
    "Phi3": {**SMALL, "tie_word_embeddings": False},
    "OPT": {
        **{k: SMALL[k] for k in ("vocab_size", "hidden_size", "num_hidden_layers")},
        "num_attention_heads": 4,
        "ffn_dim": 256,
        "word_embed_proj_dim": 128,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
        "init_std": 0.1,
    },
    "GPT2": {
        "vocab_size": VOCABULARY,
        "n_embd": 128,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 512,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "initializer_range": 0.1,
    },
}

INT8 = {"format": "integer", "bits": 8, "group_size": -1}
INT4 = {"format": "integer", "bits": 4, "group_size": 32}
SPARSE: dict[str, dict[str, Any]] = {
    "half-int8": {"format": "sparse", "n": 64, "m": 128, "values": INT8},
    "2of4-int4": {"format": "sparse", "n": 2, "m": 4, "values": INT4},
    "half-bfloat16": {"format": "sparse", "n": 64, "m": 128, "values": {"format": "dense"}},
}


def make_model(kind: str, directory: Path, **changes: Any) -> Path:
    """A random model saved by transformers; biases are random too, so that a lost one shows."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**MODELS.get(kind, {}), **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.1)
    model.save_pretrained(directory)
    return directory


def compress(
    model: Path, out: Path, formats: Mapping[str, Mapping[str, Any]], modules: Mapping[Any, str]
) -> Path:
    """Round to nearest; `modules` maps what a recipe's `match` takes to a format's name."""
    from compress_methods import convert

    recipe = {
        "formats": {name: dict(fmt) for name, fmt in formats.items()},
        "modules": [{"match": match, "format": name} for match, name in modules.items()],
        "calibration": {"held_out": 0},
    }
    convert(model, recipe, out, quiet=True)
    return out


def reference(directory: Path, prompts: list[list[int]]) -> tuple[list[list[float]], list[Any]]:
    """Log-probabilities and most likely tokens by transformers, float32, stored values unpacked."""
    import torch

    from compress_methods.checkpoint.loading.model import load_model

    model = load_model(directory)
    logprobs, top = [], []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            scores = model(ids).logits[0, :-1].float().log_softmax(-1)
        logprobs.append(scores.gather(1, ids[0, 1:, None])[:, 0].tolist())
        top.append(scores.argmax(-1).tolist())
    return logprobs, top
