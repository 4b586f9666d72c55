"""The lists that conversions refuse compressed embeddings by are those of the installed vLLM."""

from __future__ import annotations

import pytest

from compress_methods.model.vocabulary import NO_EMBEDDING, NO_HEAD

pytest.importorskip("vllm")

from vllm_compress.model_classes import EMBEDDING, HEAD, takes_quant_config


def test_the_lists_say_what_the_classes_of_vllm_do() -> None:
    from vllm.model_executor.models import ModelRegistry, registry

    embedding, head = set(), set()
    for name in (*registry._TEXT_GENERATION_MODELS, *registry._MULTIMODAL_MODELS):
        entry = ModelRegistry.models[name]
        place = entry.module_name, entry.class_name
        if not takes_quant_config(*place, EMBEDDING):
            embedding.add(name)
        if not takes_quant_config(*place, HEAD):
            head.add(name)
    assert head
    assert head == NO_HEAD
    assert embedding | head == NO_EMBEDDING
