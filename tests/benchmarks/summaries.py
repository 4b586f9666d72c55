"""The short tables of the README, from the results that are kept and from `vllm-compress plan`."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stdout
from typing import Any

WHAT_FOR = {
    "int8": "no visible loss at half the memory; no calibration",
    "int8-dynamic": "many requests at once; `int8-smooth` where inputs have outliers",
    "int4-gptq": "interactive use, where reading weights takes the time; the usual choice",
    "int4-rotated": "less loss in the same bytes, for a few percent more time",
    "auto-3.5": "where 4 bits do not fit and 3 lose too much: each layer gets what it needs",
    "int3-gptq": "models that do not fit in 4 bits",
    "trellis2": "very large models: half the loss of `int2-gptq`, slow on long prompts",
    "sparse50-int8": "models that are sparse already or will be trained on: half the weights kept",
    "width25-int4": "smaller than 4 bits alone: a quarter of the width dropped, then int4",
    "depth25-healed": "speed in everything: a quarter of the layers dropped, the rest trained",
}
"""Recipes of the README's table; `vllm-compress convert --help` lists all."""
FORMATS = ("bf16", "int8", "int4", "int2", "half of int8", "int4, vLLM's kernel")
PLAN = (
    "plan llama-4-scout --recipe int8 --recipe int4-gptq --hardware h100-80gb --rate 20/s "
    "--input 1000 --output 200 --ttft p95<500ms --tpot p95<50ms --context 8192 --json"
)


def methods(quality: dict[str, Any]) -> str:
    rows = {row["recipe"]: row for row in quality["rows"]}
    lines = [
        "| recipe | bits | KL, nats/token | perplexity | choose it for |",
        "|---|---|---|---|---|",
    ]
    for name, what in WHAT_FOR.items():
        row = rows[name]
        lines.append(
            f"| `{name}` | {row['matrix_bits_per_weight']:.2f} | {row['kl']:.5f} "
            f"| {row['perplexity']:.2f} | {what} |"
        )
    first = quality["rows"][0]
    lines.append(
        f"\nThe original: 16 bits, perplexity {first['base_perplexity']:.2f}; "
        f"{first['tokens']:,} tokens of held-out text."
    )
    return "\n".join(lines)


def speed(serving: dict[str, Any]) -> str:
    rows = {row["format"]: row for row in serving["rows"]}
    base = rows[FORMATS[0]]
    clients = [load["clients"] for load in base["loads"]]
    heads = ["format", "weights", *(f"decode, {n} request{'s' * (n > 1)}" for n in clients)]
    heads += ["first token", "prompt of 1,000 tokens"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name in FORMATS:
        row = rows[name]
        pairs = list(zip(base["loads"], row["loads"], strict=True))
        ratios = [b["tpot"] / r["tpot"] for b, r in pairs]
        ratios += [pairs[0][0]["ttft"] / pairs[0][1]["ttft"]]
        ratios += [base["long_prompt"] / row["long_prompt"]]
        cells = " | ".join(f"{ratio:.2f}x" for ratio in ratios)
        lines.append(f"| {name} | {row['bytes'] / 1e9:.2f} GB | {cells} |")
    times = ", ".join(f"{1e3 * load['tpot']:.0f}" for load in base["loads"])
    lines.append(
        f"\nSpeed relative to bf16: {times} ms per token of "
        f"{', '.join(map(str, clients))} requests, "
        f"{base['loads'][0]['ttft']:.2f} s to the first token of a 64-token prompt and "
        f"{base['long_prompt']:.1f} s for the long prompt."
    )
    return "\n".join(lines)


def planned() -> str:
    """What `PLAN` prints, best first."""
    from vllm_compress.cli import main

    said = io.StringIO()
    with redirect_stdout(said):
        main(PLAN.split())
    lines = ["| scheme | weights | GPUs by weights alone | needed | layout | TTFT p95 | TPOT p95 |"]
    lines.append("|---" * 7 + "|")
    for option in json.loads(said.getvalue())["options"]:
        latency = option["latency"]
        cells = [
            option["scheme"],
            f"{option['weight_bytes'] / 1e9:.1f} GB",
            str(option["devices_for_weights"]),
            str(option["devices"]),
            f"{option['replicas']} x {option['layout']}",
            f"{1e3 * latency['ttft']['p95']:.0f} ms",
            f"{1e3 * latency['tpot']['p95']:.1f} ms",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
