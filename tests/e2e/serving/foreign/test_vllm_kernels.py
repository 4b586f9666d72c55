"""vLLM's own kernels, chosen on GPUs, forced here: the same weights give the same model."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.support.engine import Engine
from tests.e2e.support.tiny import compress, make_model

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

EXACT = {"VLLM_COMPRESS_KERNEL": "reference"}
FORCED = {"VLLM_COMPRESS_KERNEL": "vllm"}
FORMATS = {
    "int4": {"format": "integer", "bits": 4, "group_size": 32},
    "rotated": {
        "format": "rotated",
        "base": {"format": "integer", "bits": 4, "group_size": 32},
        "block": 64,
    },
    "w8a8": {"format": "integer", "bits": 8, "group_size": -1, "activations": "int8"},
}


@pytest.mark.parametrize("name", list(FORMATS))
def test_forced_vllm_kernel(engine: Engine, tmp_path: Path, name: str) -> None:
    model = make_model("Llama", tmp_path / "model", vocab_size=480)
    packed = compress(
        model, tmp_path / "packed", {name: FORMATS[name]}, {"blocks": name, "lm_head": name}
    )
    prompts = [[5, 6, 7, 8, 9, 300, 20, 21, 22, 23]]
    expected = engine.run(packed, prompts, dtype="bfloat16", env=EXACT)
    result = engine.run(packed, prompts, dtype="bfloat16", env=FORCED)
    if "vLLM has no kernel" in result.error:
        pytest.skip(result.error)
    assert not result.error, result.error
    pairs = zip(result.logprobs[0], expected.logprobs[0], strict=True)
    differences = [abs(a - b) for a, b in pairs]
    assert sum(differences) / len(differences) < 0.1
