"""Why a checkpoint does not hold what transformers' model has: one line for each kind of model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

CLASSIFIERS = ("classifier", "score")
OTHER_HEADS = ("QuestionAnswering", "MultipleChoice", "RewardModel", "ScoreModel")
ENCODERS = ("MaskedLM", "PreTraining", "NextSentencePrediction")
EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
QUANTIZED_LEAVES = ("qweight", "weight_packed", "weight_scale", "weight_scale_inv", "SCB", "g_idx")


def why_missing(parameter: str, config: Mapping[str, Any], tensors: Iterable[str]) -> str:
    """What kind of model a checkpoint is in which `parameter` is missing, and what to do.

    `config` is config.json, `tensors` are the names in the files.
    """
    held = list(tensors)
    kind = next(iter(config.get("architectures") or ()), "") or str(config.get("model_type"))
    stored = next((name for name in held if name.rpartition(".")[2] in QUANTIZED_LEAVES), None)
    block = config.get("quantization_config")
    if block or stored:
        method = block.get("quant_method") if isinstance(block, Mapping) else None
        by = f"by {method!r}" if method else f"(it holds {stored})"
        return f"the model is already quantized {by}; convert the original"
    if ".experts." in f".{parameter}." or "block_sparse_moe" in parameter:
        return f"{kind} is a mixture of experts that are stored in a way not supported"
    if parameter.partition(".")[0] in CLASSIFIERS:
        return f"the labels of {kind} have no weights"
    if any(word in kind for word in OTHER_HEADS):
        return f"{kind} has a head that is not supported"
    if any(kind.endswith(word) for word in ENCODERS):
        return f"{kind} is an encoder, which predicts no next token"
    if isinstance(config.get("text_config"), Mapping) or "vision_config" in config:
        return f"{kind} wraps a language model in another; convert the language model alone"
    if parameter.rpartition(".")[0].endswith(("lm_head", "embed_out", "output")):
        return "the output head is neither stored nor tied to the embedding (tie_word_embeddings)"
    if any(config.get(key) for key in EXPERT_KEYS):
        return f"{kind} is a mixture of experts that are stored in a way not supported"
    return (
        f"transformers' {kind} has it; a tensor that transformers fuses or renames while loading "
        "is not supported"
    )
