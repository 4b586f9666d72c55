"""Models that are read as if they were others, or by another config.json, which compute the same.

A DistilBERT is a BERT without types of tokens and without a pooler: norms after the sums, GELU, an
epsilon of 1e-12. What comes out of a conversion is a BERT, which any vLLM serves, with labels of
tokens too. Where it labels texts a ReLU is where BERT's pooler has a tanh: config.json says so by a
key of ours, which our loaders and our class for vLLM read. Nobody else does, so nothing is written
there that others would load.

A NomicBERT has two kinds of config.json: transformers' own and one in the words of GPT-2, which is
what vLLM's class reads. What comes out of a conversion says everything in both.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from compress_methods.errors import RecipeError

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Relayout:
    """`config` gives the other model's config.json, `names` the tensors' other names (patterns, in
    order, of which all apply), `zeros` names and shapes of tensors to add. `architectures` are the
    kinds that can be read so, with the other model's."""

    architectures: Mapping[str, str]
    config: Callable[[Config], dict[str, Any]]
    names: tuple[tuple[str, str], ...] = ()
    zeros: Callable[[Config], dict[str, tuple[int, ...]]] = field(default=lambda config: {})

    def name(self, tensor: str) -> str:
        """What the other model calls a tensor."""
        for pattern, other in self.names:
            tensor = re.sub(pattern, other, tensor)
        return tensor


ACTIVATION = "pooler_activation"
COPIED = (
    *("vocab_size", "max_position_embeddings", "pad_token_id", "initializer_range", "dtype"),
    *("id2label", "label2id", "problem_type"),
)


def _bert_config(config: Config) -> dict[str, Any]:
    kind = DISTILBERT.architectures[config["architectures"][0]]
    return {
        **({ACTIVATION: "relu"} if kind == "BertForSequenceClassification" else {}),
        **{key: config[key] for key in COPIED if key in config},
        "model_type": "bert",
        "architectures": [kind],
        "hidden_size": config.get("dim", 768),
        "num_hidden_layers": config.get("n_layers", 6),
        "num_attention_heads": config.get("n_heads", 12),
        "intermediate_size": config.get("hidden_dim", 3072),
        "hidden_act": config.get("activation", "gelu"),
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-12,
        "position_embedding_type": "absolute",
    }


DISTILBERT = Relayout(
    architectures={
        "DistilBertModel": "BertModel",
        "DistilBertForMaskedLM": "BertForMaskedLM",
        "DistilBertForTokenClassification": "BertForTokenClassification",
        "DistilBertForSequenceClassification": "BertForSequenceClassification",
    },
    config=_bert_config,
    names=(
        (r"^distilbert\.", "bert."),
        (r"(^|\.)transformer\.layer\.", r"\1encoder.layer."),
        (r"\.attention\.q_lin\.", ".attention.self.query."),
        (r"\.attention\.k_lin\.", ".attention.self.key."),
        (r"\.attention\.v_lin\.", ".attention.self.value."),
        (r"\.attention\.out_lin\.", ".attention.output.dense."),
        (r"\.sa_layer_norm\.", ".attention.output.LayerNorm."),
        (r"\.ffn\.lin1\.", ".intermediate.dense."),
        (r"\.ffn\.lin2\.", ".output.dense."),
        (r"\.output_layer_norm\.", ".output.LayerNorm."),
        (r"^pre_classifier\.", "bert.pooler.dense."),
        (r"^vocab_transform\.", "cls.predictions.transform.dense."),
        (r"^vocab_layer_norm\.", "cls.predictions.transform.LayerNorm."),
        (r"^vocab_projector\.bias$", "cls.predictions.bias"),
        (r"^vocab_projector\.", "cls.predictions.decoder."),
    ),
    zeros=lambda config: {"embeddings.token_type_embeddings.weight": (1, config.get("dim", 768))},
)
GPT2_WORDS = {
    "hidden_size": ("n_embd", 768),
    "num_hidden_layers": ("n_layer", 12),
    "num_attention_heads": ("n_head", 12),
    "intermediate_size": ("n_inner", 3072),
    "layer_norm_eps": ("layer_norm_epsilon", 1e-12),
    "max_position_embeddings": ("max_trained_positions", 2048),
}
"""transformers' word -> the other one, and what both mean where neither is said."""
BUILT_IN: dict[str, Any] = {
    "activation_function": "swiglu",
    **dict.fromkeys(("qkv_proj_bias", "mlp_fc1_bias", "mlp_fc2_bias", "prenorm", "causal"), False),
    **dict.fromkeys(("parallel_block", "use_rms_norm", "rotary_emb_interleaved"), False),
    "rotary_emb_fraction": 1.0,
    **dict.fromkeys(("rotary_emb_scale_base", "rotary_scaling_factor"), None),
    "moe_every_n_layers": 0,
}
"""What transformers' class for NomicBERT computes, whatever the config says."""
LEFT_OUT = ("auto_map", "n_positions")
"""Code of its own, and how far positions reach once they are scaled."""


def _nomic_config(config: Config) -> dict[str, Any]:
    found = {key: value for key, value in config.items() if key not in LEFT_OUT}
    for key, expected in BUILT_IN.items():
        if found.setdefault(key, expected) != expected:
            raise ValueError(f"{key} is {found[key]!r}, expected {expected!r}")
    for key, (other, default) in GPT2_WORDS.items():
        found[key] = found[other] = found.get(key, found.get(other, default))
    rope = {"rope_type": "default", "rope_theta": float(found.get("rotary_emb_base", 1000))}
    return {"rope_parameters": rope, "hidden_act": "silu", **found}


NOMIC_KINDS = ("Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification")
NOMIC = Relayout({f"NomicBert{kind}": f"NomicBert{kind}" for kind in NOMIC_KINDS}, _nomic_config)
RELAYOUTS = {"distilbert": DISTILBERT, "nomic_bert": NOMIC}


def relayout_of(config: Config) -> Relayout | None:
    """How a model is read by its config.json; None: as it is."""
    found = RELAYOUTS.get(str(config.get("model_type")))
    names = config.get("architectures") or ()
    return found if found is not None and names and names[0] in found.architectures else None


def relaid(config: Config) -> dict[str, Any]:
    """The config.json that a model is read by."""
    found = relayout_of(config)
    return dict(config) if found is None else found.config(config)


def set_activation(model: Any) -> None:
    """Give the pooler of a transformers model what its config.json names."""
    name = getattr(model.config, ACTIVATION, None)
    if name is not None:
        from transformers.activations import ACT2FN

        model.base_model.pooler.activation = ACT2FN[name]


def require_ours(config: Config, plain: bool) -> None:
    """`RecipeError` where what comes out would be loaded by others, who compute something else."""
    if plain and ACTIVATION in config:
        raise RecipeError(
            "a DistilBERT that labels texts has a ReLU where others' BERT has a tanh; pack its "
            "matrices in a format of vllm-compress, which keeps it"
        )
