"""A tiny configuration of every architecture whose served log-probabilities are compared with
transformers': what differs between families (fused and interleaved query-key-value, biases, odd
heads, tied embeddings, parallel blocks, latent attention) is kept, the sizes are not."""

from __future__ import annotations

from typing import Any

from tests.e2e.support.tiny import MODELS, SMALL, VOCABULARY

UNTIED: dict[str, Any] = {**SMALL, "tie_word_embeddings": False}
TIED: dict[str, Any] = {**SMALL, "tie_word_embeddings": True}
PLAIN: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "initializer_range": 0.1,
}
GEMMA: dict[str, Any] = {**TIED, "query_pre_attn_scalar": 32, "sliding_window": 64}
FALCON: dict[str, Any] = {**PLAIN, "alibi": False, "bias": False, "tie_word_embeddings": True}
MLA: dict[str, Any] = {
    "kv_lora_rank": 64,
    "q_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
}
DENSE_DEEPSEEK: dict[str, Any] = {
    **{k: v for k, v in UNTIED.items() if k not in ("head_dim", "num_key_value_heads")},
    **MLA,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
}

ZOO: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", MODELS["Llama"]),
    "llama-tied": ("Llama", TIED),
    "llama-bias": ("Llama", {**UNTIED, "attention_bias": True, "mlp_bias": True}),
    "llama-odd-head": ("Llama", {**UNTIED, "head_dim": 80}),
    "mistral": ("Mistral", MODELS["Mistral"]),
    "ministral": ("Ministral", UNTIED),
    "ministral3": ("Ministral3", UNTIED),
    "qwen2": ("Qwen2", MODELS["Qwen2"]),
    "qwen3": ("Qwen3", MODELS["Qwen3"]),
    "gemma": ("Gemma", TIED),
    "gemma2": ("Gemma2", GEMMA),
    "gemma3": ("Gemma3Text", MODELS["Gemma3Text"]),
    "phi": ("Phi", {**PLAIN, "intermediate_size": 256}),
    "phi3": ("Phi3", MODELS["Phi3"]),
    "gpt2": ("GPT2", MODELS["GPT2"]),
    "gptj": (
        "GPTJ",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 128,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 512,
            "rotary_dim": 16,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "initializer_range": 0.1,
            "tie_word_embeddings": False,
        },
    ),
    "gpt_neox": ("GPTNeoX", {**PLAIN, "intermediate_size": 256, "tie_word_embeddings": False}),
    "gpt_bigcode": ("GPTBigCode", {**MODELS["GPT2"], "multi_query": True}),
    "gpt_bigcode-mha": ("GPTBigCode", {**MODELS["GPT2"], "multi_query": False}),
    "starcoder2": ("Starcoder2", {**TIED, "sliding_window": None}),
    "opt": ("OPT", MODELS["OPT"]),
    "bloom": (
        "Bloom",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 128,
            "n_layer": 2,
            "n_head": 4,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 1,
            "initializer_range": 0.1,
        },
    ),
    "mpt": (
        "Mpt",
        {
            "vocab_size": VOCABULARY,
            "d_model": 128,
            "n_layers": 2,
            "n_heads": 4,
            "max_seq_len": 512,
            "initializer_range": 0.1,
        },
    ),
    "falcon-new": (
        "Falcon",
        {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "falcon-old": (
        "Falcon",
        {**FALCON, "new_decoder_architecture": False, "multi_query": True, "parallel_attn": True},
    ),
    "falcon-mha": (
        "Falcon",
        {
            **FALCON,
            "new_decoder_architecture": False,
            "multi_query": False,
            "parallel_attn": False,
            "alibi": True,
            "bias": True,
        },
    ),
    "stablelm": ("StableLm", {**UNTIED, "use_qkv_bias": True}),
    "olmo": ("Olmo", {**UNTIED, "clip_qkv": 8.0}),
    "olmo2": ("Olmo2", UNTIED),
    "olmo3": ("Olmo3", {**UNTIED, "sliding_window": 64}),
    "granite": ("Granite", {**TIED, "embedding_multiplier": 4.0, "logits_scaling": 2.0}),
    "cohere": ("Cohere", {**TIED, "logit_scale": 0.5}),
    "cohere2": ("Cohere2", {**TIED, "logit_scale": 0.5, "sliding_window": 64}),
    "glm": ("Glm", {**UNTIED, "attention_bias": True}),
    "glm4": ("Glm4", {**UNTIED, "attention_bias": True}),
    "nemotron": ("Nemotron", UNTIED),
    "exaone4": ("Exaone4", {**UNTIED, "sliding_window": 64}),
    "smollm3": ("SmolLM3", TIED),
    "deepseek_v2": ("DeepseekV2", DENSE_DEEPSEEK),
    "deepseek_v3": ("DeepseekV3", {**DENSE_DEEPSEEK, "n_group": 1, "topk_group": 1}),
    "minicpm3": ("MiniCPM3", {**DENSE_DEEPSEEK, "first_k_dense_replace": 2}),
    "ernie4_5": ("Ernie4_5", TIED),
    "seed_oss": ("SeedOss", UNTIED),
    "apertus": ("Apertus", UNTIED),
    "arcee": ("Arcee", UNTIED),
    "helium": ("Helium", UNTIED),
    "hunyuan": ("HunYuanDenseV1", UNTIED),
    "lfm2": ("Lfm2", {**TIED, "layer_types": ["conv", "full_attention"]}),
    "mamba": (
        "Mamba",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 128,
            "num_hidden_layers": 2,
            "state_size": 16,
            "initializer_range": 0.1,
        },
    ),
    "mamba2": (
        "Mamba2",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 128,
            "num_hidden_layers": 2,
            "state_size": 16,
            "num_heads": 8,
            "head_dim": 32,
            "n_groups": 1,
            "initializer_range": 0.1,
        },
    ),
    "jamba": (
        "Jamba",
        {
            **UNTIED,
            "num_experts": 1,
            "num_experts_per_tok": 1,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "use_mamba_kernels": False,
        },
    ),
    "falcon_h1": (
        "FalconH1",
        {**UNTIED, "mamba_d_ssm": 128, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16},
    ),
    "gemma3n": (
        "Gemma3nText",
        {
            **TIED,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 32,
            "num_kv_shared_layers": 0,
            "intermediate_size": [256, 256],
            "layer_types": ["sliding_attention", "full_attention"],
            "activation_sparsity_pattern": [0.0, 0.0],
            "sliding_window": 64,
        },
    ),
    "llama4": (
        "Llama4Text",
        {
            **UNTIED,
            "num_local_experts": 2,
            "interleave_moe_layer_step": 4,
            "intermediate_size_mlp": 256,
        },
    ),
}

FEW: dict[str, Any] = {**UNTIED, "num_experts": 4, "num_experts_per_tok": 2}
LOCAL: dict[str, Any] = {**UNTIED, "num_local_experts": 4, "num_experts_per_tok": 2}
DEEPSEEK: dict[str, Any] = {
    **DENSE_DEEPSEEK,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
}
MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", LOCAL),
    "qwen2_moe": (
        "Qwen2Moe",
        {**FEW, "moe_intermediate_size": 128, "shared_expert_intermediate_size": 64},
    ),
    "qwen3_moe": ("Qwen3Moe", {**FEW, "moe_intermediate_size": 128}),
    "olmoe": ("Olmoe", FEW),
    "phimoe": ("Phimoe", LOCAL),
    "granitemoe": ("GraniteMoe", LOCAL),
    "glm4_moe": (
        "Glm4Moe",
        {
            **UNTIED,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
        },
    ),
    "deepseek_v2": ("DeepseekV2", DEEPSEEK),
    "deepseek_v3": ("DeepseekV3", DEEPSEEK),
    "ernie4_5_moe": (
        "Ernie4_5_Moe",
        {**UNTIED, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 64},
    ),
    "hunyuan_v1_moe": ("HunYuanMoEV1", {**UNTIED, "num_experts": 4, "moe_topk": 2}),
    "llama4": (
        "Llama4Text",
        {
            **UNTIED,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 1,
            "intermediate_size_mlp": 256,
        },
    ),
    "gpt_oss": ("GptOss", {**LOCAL, "sliding_window": 64}),
}
"""Tiny mixtures of experts, stored one by one and all in one tensor, transposed, interleaved."""

UNSERVED = {
    "apertus": "vLLM's and transformers' activation differ by 0.0013 in the dense model already",
    "deepseek_v2": "vLLM's latent attention computes in 16 bits alone on a CPU",
    "deepseek_v3": "vLLM's latent attention computes in 16 bits alone on a CPU",
    "mpt": "vLLM has not served it since 0.28",
    "lfm2": "vLLM reads a key that transformers' config no longer has",
    "mamba": "vLLM has no selective scan for a CPU",
    "jamba": "vLLM has no selective scan for a CPU",
    "gemma3n": "vLLM's class needs a GPU",
}
"""What the vLLM of this repository does not run on a CPU in float32, and so nothing proves."""
SERVED = [name for name in ZOO if name not in UNSERVED]
UNSERVED_MIXTURES = {
    "deepseek_v2": "vLLM's latent attention computes in 16 bits alone on a CPU",
    "deepseek_v3": "vLLM's latent attention computes in 16 bits alone on a CPU",
    "ernie4_5_moe": "vLLM's and transformers' differ by 0.33 in the uncompressed model already",
    "phimoe": "vLLM's router stops with a ValueError in the uncompressed model already",
}
SERVED_MIXTURES = [name for name in MIXTURES if name not in UNSERVED_MIXTURES]
