"""Eight architectures, with all that differs between them: biases, fused and transposed storage,
tied embeddings, norms in odd places. Each serves exactly what transformers computes with the
stored values."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.e2e.support.engine import Engine
from tests.e2e.support.tiny import MODELS, VOCABULARY, compress, make_model, reference

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

FORMATS = {
    "w4": {"format": "integer", "bits": 4, "group_size": 32},
    "w3": {"format": "integer", "bits": 3, "group_size": 64, "symmetric": False},
    "w8": {"format": "integer", "bits": 8, "group_size": -1},
}
# vLLM's OPT gives its embedding no quantization, and Phi-3's head is worth an odd format.
RULES = {
    "Llama": {"blocks": "w4", "embedding": "w3", "lm_head": "w8"},
    "Qwen2": {"blocks": "w3", "embedding": "w8"},
    "Gemma3Text": {"blocks": "w8", "embedding": "w4"},
    "Phi3": {"blocks": "w4", "lm_head": "w3"},
    "GPT2": {"blocks": "w3", "embedding": "w3"},
}


@pytest.mark.parametrize("kind", list(MODELS))
def test_architecture(engine: Engine, tmp_path: Path, kind: str) -> None:
    changes = {"vocab_size": 500} if kind in ("Llama", "Qwen2") else {}
    model = make_model(kind, tmp_path / "model", **changes)
    packed = compress(model, tmp_path / "packed", FORMATS, RULES.get(kind, {"blocks": "w4"}))
    draw = random.Random(0)
    prompts = [[draw.randrange(2, VOCABULARY - 20) for _ in range(40)] for _ in range(2)]
    expected, _ = reference(packed, prompts)
    result = engine.run(packed, prompts, dtype="float32", env={"VLLM_COMPRESS_KERNEL": "reference"})
    assert not result.error, result.error
    worst = max(
        abs(a - b)
        for mine, theirs in zip(result.logprobs, expected, strict=True)
        for a, b in zip(mine, theirs, strict=True)
    )
    assert worst < 1e-3
