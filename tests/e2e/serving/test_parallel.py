"""Tensor parallelism: two ranks compute what one does."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from compress_methods.formats.integer import Integer
from tests.e2e.support.engine import Engine
from tests.e2e.support.foreign import write_foreign
from tests.e2e.support.tiny import SPARSE, compress, make_model, reference

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

FORMATS = {
    "w4": {"format": "integer", "bits": 4, "group_size": 128},
    "w8": {"format": "integer", "bits": 8, "group_size": -1},
    "turned": {
        "format": "rotated",
        "base": {"format": "integer", "bits": 4, "group_size": 64},
        "block": 64,
    },
    "zeros": {
        "format": "padded",
        "base": {"format": "integer", "bits": 4, "group_size": 128},
        "cols": 768,
        "multiple": 128,
        "parts": 4,
    },
    **SPARSE,
}
EXACT = {"VLLM_COMPRESS_KERNEL": "reference"}
PROMPTS = [[5, 6, 7, 8, 9, 300, 20, 21, 22, 23]]


def test_two_ranks_give_the_log_probabilities_of_one(
    engine: Engine,
    novels_8m: Path,
    novel_tokens: list[list[int]],
    tmp_path: Path,
) -> None:
    """Two blocks in int4, int8 and each of two sparse formats, one rotated, embedding and head in
    others, a matrix with zeros in every quarter.

    By the reference kernel: the fast ones round their outputs to bfloat16, so partial sums differ.
    """
    model = compress(
        novels_8m,
        tmp_path / "mixed",
        FORMATS,
        {
            r"re:model\.layers\.0\.mlp\.down_proj": "zeros",
            r"re:model\.layers\.0\..*": "w4",
            r"re:model\.layers\.1\..*": "turned",
            r"re:model\.layers\.[23]\..*": "w8",
            r"re:model\.layers\.[45]\..*": "half-int8",
            "blocks": "2of4-int4",
            "embedding": "half-bfloat16",
            "lm_head": "w4",
        },
    )
    prompts = [tokens[:64] for tokens in novel_tokens[:4]]
    options: dict[str, Any] = {"tokens": 8, "dtype": "float32", "env": EXACT}
    one = engine.run(model, prompts, **options)
    two = engine.run(model, prompts, tensor_parallel_size=2, **options)
    assert not one.error, one.error
    assert not two.error, two.error
    pairs = zip(chain(*one.logprobs), chain(*two.logprobs), strict=True)
    differences = [abs(a - b) for a, b in pairs]
    print(f"worst {max(differences):.6f} nats")
    assert max(differences) < 1e-3
    assert one.generated == two.generated


def test_two_ranks_hold_what_others_quantized(engine: Engine, tmp_path: Path) -> None:
    """Row-parallel layers too, of whose groups a rank holds half."""
    fmt = Integer(4, 64, scale_dtype="float16")
    model = make_model("Llama", tmp_path / "model")
    packed, dense = write_foreign(model, tmp_path, "compressed-tensors", fmt)
    expected, _ = reference(dense, PROMPTS)
    env = {"VLLM_COMPRESS_KERNEL": "cpu_exact"}
    result = engine.run(packed, PROMPTS, dtype="float32", tensor_parallel_size=2, env=env)
    assert not result.error, result.error
    for got, wanted in zip(result.logprobs, expected, strict=True):
        assert got == pytest.approx(wanted, abs=2e-3)
