"""Rotated matrices are served as transformers computes with the values that they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.e2e.serving.test_quality import compare
from tests.e2e.support.engine import Engine
from tests.e2e.support.tiny import INT4, compress, reference

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

W8: dict[str, Any] = {"format": "integer", "bits": 8, "group_size": -1, "symmetric": False}
FORMATS = {
    # q, k and v as one matrix; then apart, since blocks of k's rows are smaller
    "joined": {"format": "rotated", "base": INT4},
    "apart": {"format": "rotated", "base": INT4, "block": 256},
    "zeros": {"format": "rotated", "base": W8, "block": 64},
}


def test_served_as_transformers_computes(
    engine: Engine, novels_8m: Path, novel_tokens: list[list[int]], tmp_path: Path
) -> None:
    model = compress(
        novels_8m,
        tmp_path / "rotated",
        FORMATS,
        {
            r"re:model\.layers\.[0-2]\..*": "joined",
            r"re:model\.layers\.[3-5]\..*": "apart",
            "blocks": "zeros",
            "embedding": "zeros",
            "lm_head": "joined",
        },
    )
    logprobs, top = reference(model, novel_tokens[:4])
    for kernel, bound in (("cpu_exact", 1e-3), ("reference", 1e-4)):
        env = {"VLLM_COMPRESS_KERNEL": kernel}
        result = engine.run(model, novel_tokens[:4], dtype="float32", env=env)
        difference, agreement = compare(result, logprobs, top)
        print(f"{kernel}: {difference:.6f} nats, {agreement:.2%} same top token")
        assert difference < bound
        assert agreement > 0.95
