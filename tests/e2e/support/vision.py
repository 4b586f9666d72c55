"""Tiny random vision-language models: a language tower beside a vision tower."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.e2e.support.encoders import VOCABULARY, save_with_biases
from tests.e2e.support.tiny import SMALL

ROPE = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0}
TEXT: dict[str, Any] = {**SMALL, "vocab_size": VOCABULARY, "tie_word_embeddings": False}
IMAGE = {"image_token_id": 4000, "video_token_id": 4001, "vision_start_token_id": 4002}
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "projection_dim": 64,
}
VISION: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_vl": (
        "Qwen2VL",
        {
            "text_config": {**TEXT, "rope_parameters": ROPE},
            "vision_config": {
                "depth": 2,
                "embed_dim": 64,
                "hidden_size": 128,
                "num_heads": 2,
                "mlp_ratio": 2,
            },
            **IMAGE,
            "vision_end_token_id": 4003,
        },
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VL",
        {
            "text_config": {**TEXT, "rope_parameters": ROPE},
            "vision_config": {
                "depth": 2,
                "hidden_size": 64,
                "out_hidden_size": 128,
                "intermediate_size": 128,
                "num_heads": 2,
                "fullatt_block_indexes": [1],
            },
            **IMAGE,
            "vision_end_token_id": 4003,
        },
    ),
    "qwen3_vl": (
        "Qwen3VL",
        {
            "text_config": {**TEXT, "rope_parameters": {**ROPE, "mrope_interleaved": True}},
            "vision_config": {
                "depth": 2,
                "hidden_size": 64,
                "out_hidden_size": 128,
                "intermediate_size": 128,
                "num_heads": 2,
                "deepstack_visual_indexes": [0, 1],
            },
            **IMAGE,
            "vision_end_token_id": 4003,
        },
    ),
    "llava": (
        "Llava",
        {
            "text_config": {**TEXT, "model_type": "llama"},
            "vision_config": CLIP,
            "image_token_index": 4000,
            "image_seq_length": 4,
        },
    ),
    "gemma3": (
        "Gemma3",
        {
            "text_config": {
                **TEXT,
                "tie_word_embeddings": True,
                "num_key_value_heads": 1,
                "query_pre_attn_scalar": 32,
                "sliding_window": 64,
            },
            "vision_config": {
                key: CLIP[key]
                for key in (
                    "hidden_size",
                    "intermediate_size",
                    "num_hidden_layers",
                    "num_attention_heads",
                    "image_size",
                    "patch_size",
                )
            },
            "mm_tokens_per_image": 4,
            "image_token_index": 4000,
            "boi_token_index": 4002,
            "eoi_token_index": 4003,
        },
    ),
    "llama4": (
        "Llama4",
        {
            "text_config": {
                **TEXT,
                "num_local_experts": 4,
                "num_experts_per_tok": 1,
                "interleave_moe_layer_step": 1,
                "intermediate_size_mlp": 256,
            },
            "vision_config": {
                **{key: CLIP[key] for key in ("num_hidden_layers", "image_size", "patch_size")},
                "num_attention_heads": 2,
                "hidden_size": 64,
                "intermediate_size": 256,
                "vision_output_dim": 64,
                "projector_input_dim": 64,
                "projector_output_dim": 64,
            },
            "image_token_index": 4000,
        },
    ),
    "mistral3": (
        "Mistral3",
        {
            "text_config": {**TEXT, "model_type": "mistral", "sliding_window": None},
            "vision_config": {
                "model_type": "pixtral",
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 56,
                "patch_size": 14,
            },
            "image_token_index": 4000,
        },
    ),
}


def make_vision(name: str, directory: Path) -> Path:
    """A random model saved by transformers; biases are random too, so that a lost one shows."""
    import torch
    import transformers

    kind, values = VISION[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**values)
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).float()
    save_with_biases(model, directory)
    (directory / "preprocessor_config.json").write_text("{}")
    return directory
