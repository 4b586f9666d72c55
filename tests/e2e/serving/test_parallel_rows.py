"""Tensor parallelism where vLLM moves rows or cuts a matrix in odd places: two ranks compute what
transformers does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.e2e.support.engine import Engine
from tests.e2e.support.tiny import compress, make_model, reference
from tests.e2e.support.zoo import ZOO

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

W4 = {"w4": {"format": "integer", "bits": 4, "group_size": 32}}
PROMPTS = [[5, 6, 7, 8, 9, 300, 20, 21, 22, 23]]
CASES: dict[str, dict[str, Any]] = {
    "falcon-new": {},
    "bloom": {},
    "llama4": {},
}


def pack(name: str, directory: Path, **changes: Any) -> Path:
    kind, config = ZOO[name]
    model = make_model(kind, directory / "model", **{**config, **changes})
    return compress(model, directory / "packed", W4, {"blocks": "w4"})


@pytest.mark.parametrize("name", list(CASES))
def test_two_ranks(engine: Engine, tmp_path: Path, name: str) -> None:
    packed = pack(name, tmp_path, **CASES[name])
    expected, _ = reference(packed, PROMPTS)
    env = {"VLLM_COMPRESS_KERNEL": "reference"}
    result = engine.run(packed, PROMPTS, dtype="float32", tensor_parallel_size=2, env=env)
    assert not result.error, result.error
    for got, wanted in zip(result.logprobs, expected, strict=True):
        assert got == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize("groups", [1, 2])
def test_mamba2_is_refused(engine: Engine, tmp_path: Path, groups: int) -> None:
    """vLLM cuts its fused in_proj in a way that ours does not follow."""
    packed = pack("mamba2", tmp_path, n_groups=groups)
    result = engine.run(packed, PROMPTS, dtype="float32", tensor_parallel_size=2)
    assert result.error
    assert "a compressed Mamba-2 is not served over several ranks" in engine.log
