"""vLLM's classes for encoders, changed where checkpoints that `convert` has written want it.

NomicBERT, GTE: queries, keys and values lie apart, as do gate and up, under the names that
transformers' classes have; vLLM's own classes load `Wqkv` whole and know no shard of it. A
DistilBERT that labels texts is a BERT with a ReLU in its pooler. `model_classes.py` puts these in
the place of vLLM's, for compressed checkpoints alone; layers and what they compute are vLLM's.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.models.bert import BertForSequenceClassification
from vllm.model_executor.models.bert_with_rope import NomicBertModel, SnowflakeGteNewModel
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper

NAMES = WeightsMapper(
    orig_to_new_substr={
        # Of tensors that are kept, under the names that the original has for them.
        "emb_ln.": "embeddings.LayerNorm.",
        "attention.o_proj": "attn.out_proj",
        ".mlp.fc11.": ".mlp.up_proj.",
        ".mlp.fc12.": ".mlp.gate_proj.",
        ".mlp.fc2.": ".mlp.down_proj.",
        ".norm1.": ".attn_ln.",
        ".norm2.": ".mlp_ln.",
        # Of transformers' classes.
        "self_attn.o_proj": "attn.out_proj",
        "self_attn.": "attn.",
        "post_attention_layernorm": "attn_ln",
        "post_mlp_layernorm": "mlp_ln",
    },
    orig_to_new_stacked={
        ".attn.q_proj": (".attn.qkv_proj", "q"),
        ".attn.k_proj": (".attn.qkv_proj", "k"),
        ".attn.v_proj": (".attn.qkv_proj", "v"),
        ".mlp.gate_proj": (".mlp.gate_up_proj", 0),
        ".mlp.up_proj": (".mlp.gate_up_proj", 1),
    },
    orig_to_new_prefix={
        **dict.fromkeys(("nomic_bert.", "gte.", "new."), ""),
        "pooler.": None,
        "encoder.layer.": "encoder.layers.",
        "layers.": "encoder.layers.",
    },
)


class InParts:
    """A loader for what vLLM's own would look for in one piece."""

    hf_to_vllm_mapper = NAMES

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return AutoWeightsLoader(self).load_weights(weights, mapper=NAMES)


class CompressedNomicBertModel(InParts, NomicBertModel):
    """vLLM's NomicBERT."""


class CompressedGteModel(InParts, SnowflakeGteNewModel):
    """vLLM's GTE."""


class CompressedDistilBertForSequenceClassification(BertForSequenceClassification):
    """vLLM's BERT, with the activation of DistilBERT before its classifier."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.bert.pooler.act_fn = nn.ReLU()
