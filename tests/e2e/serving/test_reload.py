"""Weights that are reloaded in place, and ways of loading that compressed weights do not take."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from compress_methods.checkpoint.safetensors import read_tensors, write_tensors
from tests.e2e.serving.test_quality import compare
from tests.e2e.support.engine import Engine
from tests.e2e.support.tiny import INT4, INT8, VOCABULARY, compress, make_model, reference

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

FORMATS: dict[str, Any] = {"w4": INT4, "w8": INT8}
RULES: dict[Any, str] = {"blocks": "w4", "embedding": "w8"}


def prompts() -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(2, VOCABULARY - 20) for _ in range(40)] for _ in range(2)]


def pair(kind: str, folder: Path) -> tuple[Path, Path]:
    """Two models that differ in every value, packed alike."""
    model = make_model(kind, folder / "one")
    tensors = read_tensors(model / "model.safetensors")
    torch.manual_seed(1)
    other = make_model(kind, folder / "two")
    write_tensors(
        other / "model.safetensors",
        {name: (t * 0.7 + 0.1 * torch.randn_like(t)) for name, t in tensors.items()},
    )
    return tuple(  # type: ignore[return-value]
        compress(each, folder / f"{each.name}-packed", FORMATS, RULES) for each in (model, other)
    )


@pytest.mark.parametrize(("kind", "kernel"), [("Qwen2", "cpu_exact"), ("Llama", "reference")])
def test_reloaded_weights_answer(engine: Engine, tmp_path: Path, kind: str, kernel: str) -> None:
    """Qwen2's head is tied, and its q, k and v have biases."""
    first, second = pair(kind, tmp_path)
    env = {"VLLM_COMPRESS_KERNEL": kernel}
    before = compare(
        engine.run(first, prompts(), dtype="float32", env=env), *reference(second, prompts())
    )
    after = engine.run(first, prompts(), dtype="float32", env=env, reload=second)
    assert before[0] > 0.1
    assert compare(after, *reference(second, prompts()))[0] < 1e-4


def test_what_a_server_has_prepared_is_not_loaded(engine: Engine, tmp_path: Path) -> None:
    packed = compress(make_model("Llama", tmp_path / "m"), tmp_path / "out", FORMATS, RULES)
    error = engine.run(packed, prompts(), dtype="float32", load_format="sharded_state").error
    assert "--load-format sharded_state loads what a server has prepared before" in error
    assert "\n" not in error
