"""Which schemes to look at for a use, and why.

Published: Kurtic et al., "Give Me BF16 or Give Me Death?" (ACL 2025, arXiv 2411.02355), vLLM on
several GPUs with the Llama 3.1 family: 4-bit weights with 16-bit activations are the most
cost-efficient for one request at a time and on mid-tier GPUs, 8-bit weights and activations for
continuous batching of mid and large models on high-end GPUs; 8 bits lose next to nothing, 4 bits a
little. Measured here: the README's tables (quality of every recipe, kernels and servers on CPUs).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Use:
    """A way models are used: lengths and bounds it usually has, recipes that fit it, and why."""

    prompt: int
    output: int
    ttft: str
    tpot: str
    recipes: tuple[str, ...]
    why: tuple[str, ...]


USES = {
    "chat": Use(
        1000,
        200,
        "p95<500ms",
        "p95<50ms",
        ("int4-gptq", "int8"),
        (
            "int4-gptq: people wait for every token, batches stay small, and a step then takes as "
            "long as reading the weights; 4 bits read a quarter (ACL 2025: the most cost-efficient "
            "for requests that do not wait for each other)",
            "int8: where 4 bits lose too much; half the bytes, a loss hard to measure",
        ),
    ),
    "rag": Use(
        4000,
        300,
        "p95<2s",
        "p95<50ms",
        ("int8-dynamic", "int4-gptq"),
        (
            "int8-dynamic: long prompts are arithmetic, not reading, and int8 units do twice the "
            "work of 16-bit ones; weight-only formats do not speed up prompts on GPUs",
            "int4-gptq: long contexts fill memory with KV cache, and each byte of weights saved is "
            "one for it; look at --kv-cache fp8 too, which halves the cache itself",
        ),
    ),
    "batch": Use(
        1000,
        500,
        "p95<60s",
        "p95<500ms",
        ("int8-dynamic", "int8"),
        (
            "int8-dynamic: large batches are limited by arithmetic, and int8 units do twice the "
            "work of 16-bit ones (ACL 2025: 8-bit weights and activations win under continuous "
            "batching of mid and large models on high-end GPUs)",
            "int8: hardware without int8 units, or the last tenth of a percent of quality",
        ),
    ),
}
DEFAULT = Use(1000, 200, "p95<1s", "p95<100ms", ("int8", "int4-gptq"), ())
