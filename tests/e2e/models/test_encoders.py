"""Encoders, classifiers, rerankers and causal models that pool: what vLLM's pooling runner gives is
what transformers computes with the stored values."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from compress_methods import convert
from tests.e2e.support.encoders import ENCODERS, VOCABULARY, expected, make_encoder
from tests.e2e.support.engine import REPOSITORY, Engine, Result
from tests.e2e.support.tiny import INT4, INT8, compress

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

WORST = 2e-5
REFERENCE = {"VLLM_COMPRESS_KERNEL": "reference"}


def prompts() -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(3, VOCABULARY - 20) for _ in range(n)] for n in (40, 23)]


def pool(engine: Engine, packed: Path, name: str) -> Result:
    task = ENCODERS[name][2]
    options: dict[str, Any] = {"dtype": "float32", "skip_tokenizer_init": False}
    return engine.run(packed, prompts(), task=task, env=REFERENCE, **options)


def check(engine: Engine, packed: Path, name: str) -> None:
    result = pool(engine, packed, name)
    assert not result.error, result.error
    for mine, theirs in zip(result.pooled, expected(packed, name, prompts()), strict=True):
        assert float((torch.tensor(mine) - theirs).abs().max()) < WORST


@pytest.mark.parametrize("name", ENCODERS)
def test_pooled_as_transformers_computes(engine: Engine, tmp_path: Path, name: str) -> None:
    model = make_encoder(name, tmp_path / "model")
    rules: dict[Any, str] = {"blocks": "w4"}
    if name.endswith("-embedding"):
        rules |= {"embedding": "w8"} | ({} if "tied" in name else {"lm_head": "w8"})
    check(engine, compress(model, tmp_path / "out", {"w4": INT4, "w8": INT8}, rules), name)


def test_calibrated_by_a_shipped_recipe(engine: Engine, tmp_path: Path, some_text: Path) -> None:
    model = make_encoder("bert", tmp_path / "model")
    block = yaml.safe_load((REPOSITORY / "configs" / "recipes" / "int4-gptq.yaml").read_text())
    block["calibration"] = {"length": 64, "samples": 16, "held_out": 4}
    report = convert(model, block, tmp_path / "out", calibration=some_text, quiet=True)
    assert 0.98 < report["held_out"]["cosine"] < 1
    check(engine, tmp_path / "out", "bert")


def test_a_reranker_made_of_two_tokens_needs_its_head(engine: Engine, tmp_path: Path) -> None:
    """The score's weights are rows of the head, which is not compressed unless a rule says so."""
    model = make_encoder("qwen2-embedding", tmp_path / "model")
    packed = compress(model, tmp_path / "out", {"w4": INT4}, {"blocks": "w4"})
    overrides = {
        "architectures": ["Qwen2ForSequenceClassification"],
        "classifier_from_token": ["a", "b"],
        "method": "from_2_way_softmax",
    }
    options: dict[str, Any] = {"dtype": "float32", "skip_tokenizer_init": False}
    result = engine.run(
        packed, prompts(), task="classify", env=REFERENCE, hf_overrides=overrides, **options
    )
    assert not result.error, result.error
    from transformers import AutoTokenizer

    from compress_methods.checkpoint.loading.model import load_model

    ids = [AutoTokenizer.from_pretrained(packed).convert_tokens_to_ids(t) for t in "ab"]
    network = load_model(packed)
    for prompt, (found,) in zip(prompts(), result.pooled, strict=True):
        with torch.no_grad():
            logits = network(input_ids=torch.tensor([prompt])).logits[0, -1]
        assert found == pytest.approx(float(logits[ids[1]] - logits[ids[0]]), abs=WORST)
