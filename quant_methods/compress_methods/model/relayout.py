"""Models that vLLM has no class for, but a class that computes the same: read as if they were that.

A DistilBERT is a BERT without types of tokens and without a pooler: norms after the sums, GELU, an
epsilon of 1e-12. What comes out of a conversion is a BERT, which any vLLM serves, with labels of
tokens too. With one label of a text it is none: a ReLU is where BERT's pooler has a tanh.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Relayout:
    """`config` gives the other model's config.json, `names` the tensors' other names (patterns, in
    order, of which all apply), `zeros` names and shapes of tensors to add. `architectures` are the
    kinds that can be read so, with the other model's."""

    architectures: Mapping[str, str]
    config: Callable[[Config], dict[str, Any]]
    names: tuple[tuple[str, str], ...]
    zeros: Callable[[Config], dict[str, tuple[int, ...]]]

    def name(self, tensor: str) -> str:
        """What the other model calls a tensor."""
        for pattern, other in self.names:
            tensor = re.sub(pattern, other, tensor)
        return tensor


COPIED = (
    *("vocab_size", "max_position_embeddings", "pad_token_id", "initializer_range", "dtype"),
    *("id2label", "label2id", "problem_type"),
)


def _bert_config(config: Config) -> dict[str, Any]:
    return {
        **{key: config[key] for key in COPIED if key in config},
        "model_type": "bert",
        "architectures": [DISTILBERT.architectures[config["architectures"][0]]],
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
        (r"^vocab_transform\.", "cls.predictions.transform.dense."),
        (r"^vocab_layer_norm\.", "cls.predictions.transform.LayerNorm."),
        (r"^vocab_projector\.bias$", "cls.predictions.bias"),
        (r"^vocab_projector\.", "cls.predictions.decoder."),
    ),
    zeros=lambda config: {"embeddings.token_type_embeddings.weight": (1, config.get("dim", 768))},
)
RELAYOUTS = {"distilbert": DISTILBERT}


def relayout_of(config: Config) -> Relayout | None:
    """How a model is read by its config.json; None: as it is."""
    found = RELAYOUTS.get(str(config.get("model_type")))
    names = config.get("architectures") or ()
    return found if found is not None and names and names[0] in found.architectures else None


def relaid(config: Config) -> dict[str, Any]:
    """The config.json that a model is read by."""
    found = relayout_of(config)
    return dict(config) if found is None else found.config(config)
