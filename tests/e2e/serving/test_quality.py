"""A served model computes what its stored values say, up to the rounding of the kernels."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.support.engine import Engine, Result
from tests.e2e.support.tiny import reference

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def compare(result: Result, logprobs: list[list[float]], top: list[list[int]]) -> tuple:
    """Mean absolute difference in nats, and the fraction of equal most likely tokens."""
    assert not result.error, result.error
    pairs = [
        (a, b)
        for mine, theirs in zip(result.logprobs, logprobs, strict=True)
        for a, b in zip(mine, theirs, strict=True)
    ]
    same = [
        a == b
        for mine, theirs in zip(result.top, top, strict=True)
        for a, b in zip(mine, theirs, strict=True)
    ]
    return sum(abs(a - b) for a, b in pairs) / len(pairs), sum(same) / len(same)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_int4_serves_what_is_stored_without_quantizing_activations(
    engine: Engine, novels_8m: Path, novels_int4: Path, novel_tokens: list[list[int]], dtype: str
) -> None:
    logprobs, top = reference(novels_int4, novel_tokens)
    difference, agreement = compare(
        engine.run(
            novels_int4, novel_tokens, dtype=dtype, env={"VLLM_COMPRESS_KERNEL": "cpu_exact"}
        ),
        logprobs,
        top,
    )
    print(f"{dtype}: {difference:.5f} nats, {agreement:.4%} top-1 of {sum(map(len, top))}")
    # What 16 bits cost is vLLM's affair: without AVX-512 its kernels cut bits off.
    original = engine.run(novels_8m, novel_tokens, dtype=dtype)
    cost, _ = compare(original, *reference(novels_8m, novel_tokens))
    print(f"{dtype}: {cost:.5f} nats of the original")
    assert difference < max(1.25 * cost, 0.001)
    assert agreement >= 0.98


def test_the_reference_kernel_is_exact(
    engine: Engine, novels_int4: Path, novel_tokens: list[list[int]]
) -> None:
    logprobs, top = reference(novels_int4, novel_tokens[:2])
    result = engine.run(
        novels_int4,
        novel_tokens[:2],
        dtype="float32",
        env={"VLLM_COMPRESS_KERNEL": "reference"},
    )
    difference, agreement = compare(result, logprobs, top)
    assert difference < 1e-5
    assert agreement == 1
