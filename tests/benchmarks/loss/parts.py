"""What each part of a recipe wins: algorithms side by side, novels-8m, on a novel it has not seen.

GPTQ against rounding without the range search, the choice of the weights that stay, blocks of 128
against a free choice in each row, what refitting wins where channels are dropped. Calibrated and
measured as `quality` is; it takes up to an hour.
"""

from __future__ import annotations

from typing import Any

from tests.benchmarks.loss import quality
from tests.benchmarks.readme import RESULTS
from tests.benchmarks.speed import sparse_cases

TWO_PASSES = "50% sparse, 4 bits, sparsegpt, then gptq"
PLAIN_BITS = (4, 3, 2)


def plain_name(bits: int, algorithm: str) -> str:
    return f"{bits} bits, {algorithm}, no clipping"


def plain(bits: int, algorithm: str) -> dict[str, Any]:
    """Group 128, symmetric, no clipping search."""
    return {
        "formats": {"w": {"format": "integer", "bits": bits, "group_size": 128}},
        "modules": [{"match": "blocks", "format": "w", "algorithm": algorithm}],
    }


def pruned() -> list[quality.Case]:
    """Layers and widths dropped, and width alone with what refitting wins."""

    def width(share: float, **more: Any) -> dict[str, Any]:
        stage = {"transform": "width", "ffn": share, "multiple": 64, **more}
        return {"stages": [stage]}

    heads = {"attention": 0.5, "tensor_parallel": 2}
    return [
        ("1 of 8 layers dropped", {"stages": [{"transform": "depth", "drop": 1}]}),
        ("25% of the channels dropped", width(0.25)),
        ("50% of the channels dropped", width(0.5)),
        ("50% of the channels dropped, not refitted", width(0.5, compensate=False)),
        ("50% of the channels and heads dropped", width(0.5, **heads)),
    ]


def corrected() -> list[quality.Case]:
    """About the same bytes spent on more scales, or on what 2 bits lost most of."""

    def two_bits(group_size: int) -> dict[str, Any]:
        return {"format": "integer", "bits": 2, "group_size": group_size, "levels": "mid"}

    def recipe(fmt: dict[str, Any], algorithm: Any) -> dict[str, Any]:
        modules = [{"match": "blocks", "format": "w", "algorithm": algorithm}]
        return {"formats": {"w": fmt}, "modules": modules}

    gptq = {"algorithm": "gptq", "clip": True}
    rank_1 = {"format": "lowrank", "rank": 1, "base": two_bits(128)}
    return [
        ("2 bits, groups of 64", recipe(two_bits(64), gptq)),
        ("2 bits, rank 1", recipe(rank_1, {"algorithm": "svd", "base": gptq, "rounds": 4})),
    ]


def cases() -> list[quality.Case]:
    side_by_side: list[quality.Case] = [
        (plain_name(bits, name), plain(bits, name))
        for bits in PLAIN_BITS
        for name in ("gptq", "rtn")
    ]
    return [*side_by_side, *corrected(), *sparse_cases.cases(), *pruned(), (TWO_PASSES, None)]


def run() -> dict[str, Any]:
    return quality.measure_all(cases(), RESULTS / "parts.json")


def table(results: dict[str, Any]) -> str:
    by_name = {row["recipe"]: row for row in results["rows"]}
    ratios = []
    for bits in PLAIN_BITS:
        gptq, rtn = (by_name[plain_name(bits, name)]["kl"] for name in ("gptq", "rtn"))
        ratios.append(f"{bits} bits {gptq / rtn:.3f}")
    tokens = results["rows"][0]["tokens"]
    both = f"KL of GPTQ / KL of RTN, both without clipping: {', '.join(ratios)} ({tokens} tokens)"
    return f"{quality.table(results)}\n\n{both}"
