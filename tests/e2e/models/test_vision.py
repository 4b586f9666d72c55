"""The language model inside a vision-language model: log-probabilities of text are those that
transformers computes with the stored values. Needs torchvision, which vLLM's classes import and
which its CPU build runs without."""

from __future__ import annotations

import random
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.support.engine import Engine
from tests.e2e.support.served import check_served
from tests.e2e.support.tiny import INT4, INT8, compress
from tests.e2e.support.vision import VISION, make_vision

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("torchvision") is None, reason="needs torchvision"),
]

WORST = 2e-5


def prompts() -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(3, 3900) for _ in range(n)] for n in (40, 23)]


@pytest.mark.parametrize("name", VISION)
def test_text_as_transformers_computes(engine: Engine, tmp_path: Path, name: str) -> None:
    model = make_vision(name, tmp_path / "model")
    rules: dict[Any, str] = {"blocks": "w4", "embedding": "w8"}
    packed = compress(model, tmp_path / "out", {"w4": INT4, "w8": INT8}, rules)
    limits = {"image": 0, **({"video": 0} if name.startswith("qwen") else {})}
    check_served(engine, packed, prompts(), WORST, kernel="reference", limit_mm_per_prompt=limits)
