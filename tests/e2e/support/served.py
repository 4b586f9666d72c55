"""What a server of a checkpoint computes beside what transformers does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.e2e.serving.test_quality import compare
from tests.e2e.support.engine import Engine
from tests.e2e.support.tiny import reference


def check_served(
    engine: Engine,
    model: Path,
    prompts: list[list[int]],
    bound: float,
    *,
    ranks: int = 1,
    kernel: str | None = None,
    agree: float = 0.95,
    **options: Any,
) -> None:
    """Assert that log-probabilities differ by less than `bound` nats on average, and that the most
    likely token is the same at more than `agree` of the places; `options` are `LLM`'s."""
    logprobs, top = reference(model, prompts)
    env = {} if kernel is None else {"VLLM_COMPRESS_KERNEL": kernel}
    options |= {"dtype": "float32", "tensor_parallel_size": ranks}
    result = engine.run(model, prompts, env=env, **options)
    difference, agreement = compare(result, logprobs, top)
    print(f"{model.name}, {ranks} ranks, {kernel}: {difference:.6f} nats, {agreement:.2%} same")
    assert difference < bound
    assert agreement > agree
