"""Tiny random encoders and models with heads, and what transformers computes with their values."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from tests.e2e.support.tiny import SMALL

VOCABULARY = 4096
"""Of the tokenizer in `tests/assets`, which vLLM wants beside a model that pools."""
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")

BERT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 520,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "initializer_range": 0.1,
}
MODERN: dict[str, Any] = {
    **BERT,
    "cls_token_id": 0,
    "sep_token_id": 2,
    "local_attention": 32,
    "global_attn_every_n_layers": 2,
}
DISTIL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "dim": 128,
    "hidden_dim": 256,
    "n_layers": 2,
    "n_heads": 4,
    "max_position_embeddings": 520,
    "initializer_range": 0.1,
}
CAUSAL: dict[str, Any] = {**SMALL, "vocab_size": VOCABULARY, "tie_word_embeddings": False}
ASSET = Path(__file__).parents[2] / "assets" / "novels-8m"
EMBED, CLASSIFY, TOKENS = "embed", "classify", "token_classify"
ENCODERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "bert": ("BertModel", BERT, EMBED),
    "bert-masked": ("BertForMaskedLM", BERT, TOKENS),
    "bert-classes": ("BertForSequenceClassification", {**BERT, "num_labels": 3}, CLASSIFY),
    "bert-tokens": ("BertForTokenClassification", {**BERT, "num_labels": 5}, TOKENS),
    "roberta": ("RobertaModel", {**BERT, "type_vocab_size": 1}, EMBED),
    "roberta-masked": ("RobertaForMaskedLM", {**BERT, "type_vocab_size": 1}, EMBED),
    "roberta-classes": (
        "RobertaForSequenceClassification",
        {**BERT, "type_vocab_size": 1, "num_labels": 3},
        CLASSIFY,
    ),
    "xlm-roberta": (
        "XLMRobertaModel",
        {**BERT, "type_vocab_size": 1, "position_embedding_type": "absolute"},
        EMBED,
    ),
    "xlm-roberta-classes": (
        "XLMRobertaForSequenceClassification",
        {**BERT, "type_vocab_size": 1, "num_labels": 1},
        CLASSIFY,
    ),
    "modernbert": ("ModernBertModel", MODERN, EMBED),
    "modernbert-classes": (
        "ModernBertForSequenceClassification",
        {**MODERN, "num_labels": 3},
        CLASSIFY,
    ),
    "distilbert": ("DistilBertModel", DISTIL, EMBED),
    "distilbert-masked": ("DistilBertForMaskedLM", DISTIL, TOKENS),
    "distilbert-tokens": (
        "DistilBertForTokenClassification",
        {**DISTIL, "num_labels": 5},
        TOKENS,
    ),
    "distilbert-classes": (
        "DistilBertForSequenceClassification",
        {**DISTIL, "num_labels": 3},
        CLASSIFY,
    ),
    "nomic": ("NomicBertModel", BERT, EMBED),
    "gte": ("GteModel", BERT, EMBED),
    "qwen2-embedding": ("Qwen2ForCausalLM", CAUSAL, EMBED),
    "qwen2-tied-embedding": (
        "Qwen2ForCausalLM",
        {**CAUSAL, "tie_word_embeddings": True},
        EMBED,
    ),
    "qwen2-model": ("Qwen2Model", CAUSAL, EMBED),
    "qwen2-classes": ("Qwen2ForSequenceClassification", {**CAUSAL, "num_labels": 3}, CLASSIFY),
    "qwen3-reranker": ("Qwen3ForSequenceClassification", {**CAUSAL, "num_labels": 1}, CLASSIFY),
}


def expected(directory: Path, name: str, prompts: list[list[int]]) -> list[Any]:
    """What vLLM's pooler should give, by transformers in float32 with the stored values."""
    import torch

    from compress_methods.checkpoint.loading.model import load_model

    model, (kind, _, task) = load_model(directory), ENCODERS[name]
    found = []
    for prompt in prompts:
        with torch.no_grad():
            out = model(input_ids=torch.tensor([prompt]), output_hidden_states=True)
        if task != EMBED:
            found.append(out.logits[0])
        else:
            states = out.hidden_states[-1] if "logits" in out else out.last_hidden_state
            found.append(states[0, -1 if kind.startswith("Qwen") else 0])
    return found


def make_encoder(name: str, directory: Path) -> Path:
    """A random model saved by transformers; biases are random too, so that a lost one shows."""
    import torch
    import transformers

    kind, values, _ = ENCODERS[name]
    torch.manual_seed(0)
    cls = getattr(transformers, kind)
    model = cls(cls.config_class(**values)).float()
    save_with_biases(model, directory)
    return directory


def save_with_biases(model: Any, directory: Path) -> None:
    """Biases made random, and a tokenizer beside the model."""
    import torch

    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.normal_(0, 0.1)
    model.save_pretrained(directory)
    for file in TOKENIZER:
        shutil.copyfile(ASSET / file, directory / file)
