"""What a checkpoint is for, by the end of its architecture's name in config.json: which class of
transformers builds it, and what its outputs are judged by.

    NEXT_TOKEN   logits of the token that follows
    SAME_TOKEN   logits of the token that stands there (masked language models)
    CLASSES      logits of labels, of a sequence or of each of its tokens
    STATES       the hidden states themselves: an encoder, or a causal model without its head
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

NEXT_TOKEN, SAME_TOKEN = "next_token", "same_token"
CLASSES, STATES = "classes", "states"


@dataclass(frozen=True)
class Task:
    """`auto_class` of transformers, and the `loss`, one of the four above."""

    auto_class: str
    loss: str


TASKS = {
    "ForSequenceClassification": Task("AutoModelForSequenceClassification", CLASSES),
    "ForTokenClassification": Task("AutoModelForTokenClassification", CLASSES),
    "ForMaskedLM": Task("AutoModelForMaskedLM", SAME_TOKEN),
    "Model": Task("AutoModel", STATES),
}
GENERATION = "ForConditionalGeneration"
MULTIMODAL = Task("AutoModelForImageTextToText", NEXT_TOKEN)
"""A language model with a vision tower beside it; without one the name is that of a translator."""
HEADED = ("LMHeadModel", "HeadsModel", "RewardModel", "ScoreModel")
"""Names that end in `Model` and have a head all the same."""


def task_of(config: Any) -> Task | None:
    """The task of a model's config, transformers' or the mapping in config.json; None for a causal
    language model, or where the name does not tell."""
    found = (
        config.get("architectures")
        if isinstance(config, Mapping)
        else getattr(config, "architectures", None)
    )
    name = str(found[0]) if isinstance(found, (list, tuple)) and found else ""
    if name.endswith(HEADED):
        return None
    if name.endswith(GENERATION):
        held = config if isinstance(config, Mapping) else vars(config)
        return MULTIMODAL if held.get("vision_config") is not None else None
    return next((task for end, task in TASKS.items() if name.endswith(end)), None)
