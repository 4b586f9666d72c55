"""Mixtures of experts, served: log-probabilities are those that transformers computes with the
stored values, for every family that this vLLM serves on a CPU, and over two ranks."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.serving.test_quality import compare
from tests.e2e.support.engine import Engine
from tests.e2e.support.served import check_served
from tests.e2e.support.tiny import INT4, INT8, SPARSE, VOCABULARY, compress, make_model, reference
from tests.e2e.support.zoo import MIXTURES, SERVED_MIXTURES

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

EXACT, ROUNDED = 2e-5, 0.1
"""Nats: of float32, and of 8-bit activations in models whose weights are random."""
FORMATS: dict[str, dict[str, Any]] = {
    "int4": INT4,
    "int8": INT8,
    "lookup": {"format": "lookup", "bits": 3, "group_size": 64, "table": "learned"},
    "sparse": SPARSE["half-int8"],
}


def prompts() -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(2, VOCABULARY - 20) for _ in range(40)] for _ in range(2)]


def pack(name: str, fmt: str, folder: Path) -> Path:
    """A random mixture of a family, its experts and the layers beside them in one format."""
    kind, config = MIXTURES[name]
    model = make_model(kind, folder / "model", **config)
    rules = {"experts": fmt, "blocks": "int4"}
    return compress(model, folder / f"{name}-{fmt}", {**FORMATS, fmt: FORMATS[fmt]}, rules)


@pytest.mark.parametrize("name", SERVED_MIXTURES)
def test_families(engine: Engine, tmp_path: Path, name: str) -> None:
    packed = pack(name, "int4", tmp_path)
    check_served(engine, packed, prompts(), EXACT, kernel="reference")
    check_served(engine, packed, prompts(), ROUNDED, agree=0.8)


@pytest.mark.parametrize(
    ("name", "fmt"), [("mixtral", "sparse"), ("qwen3_moe", "lookup"), ("gpt_oss", "int8")]
)
def test_formats_over_two_ranks(engine: Engine, tmp_path: Path, name: str, fmt: str) -> None:
    packed = pack(name, fmt, tmp_path)
    check_served(engine, packed, prompts(), EXACT, ranks=2, kernel="reference")


def test_experts_over_two_ranks(engine: Engine, tmp_path: Path) -> None:
    """Expert parallelism: each rank has half of the experts, whole."""
    packed = pack("mixtral", "int8", tmp_path)
    options: dict[str, Any] = {"tensor_parallel_size": 2, "enable_expert_parallel": True}
    env = {"VLLM_COMPRESS_KERNEL": "reference"}
    result = engine.run(packed, prompts(), dtype="float32", env=env, **options)
    assert compare(result, *reference(packed, prompts()))[0] < EXACT


def test_experts_of_one_layer_go_together(engine: Engine, tmp_path: Path) -> None:
    kind, config = MIXTURES["mixtral"]
    model = make_model(kind, tmp_path / "model", **config)
    packed = compress(model, tmp_path / "out", FORMATS, {r"re:.*experts\.0\..*": "int4"})
    error = engine.run(packed, prompts(), dtype="float32").error
    assert "experts.1.w1 is kept as it is, but model.layers.0.block_sparse_moe.experts.0." in error
