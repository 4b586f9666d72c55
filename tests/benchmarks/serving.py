"""Speed and memory of real vLLM servers, one after another in one run: bf16, every number of bits,
and half of int8 and int4.

A random Llama of 1.2 billion parameters (Llama-3.2-1B shape, vocabulary 128,256), round to nearest,
since speed does not depend on the values. Eager, all cores; a prompt of 64 tokens, then `TOKENS`
generated, one request at a time and four together. Only ratios carry over to other machines.
Weights in memory are what the processes hold, less what the bf16 server holds besides its weights.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.benchmarks.kernels import half
from tests.benchmarks.memory import ONE_B, VOCABULARY, make_llama
from tests.e2e.server import VllmServer

TOKENS = 12
FORMATS: dict[str, dict[str, Any]] = {
    "int8": {"bits": 8, "group_size": -1},
    "int8-dynamic": {"bits": 8, "group_size": -1, "activations": "int8"},
    "int4": {"bits": 4, "group_size": 128},
    "int3": {"bits": 3, "group_size": 128},
    "int2": {"bits": 2, "group_size": 128},
    "half of int8": half(128, bits=8, group_size=-1),
    "half of int4": half(128, bits=4, group_size=128),
}


def measure(model: Path) -> dict[str, float]:
    """Time to first token and per output token in seconds, tokens/s of four requests together, and
    the server's memory in bytes."""
    from openai import OpenAI

    with VllmServer(model, "--served-model-name", "m", "--dtype", "bfloat16") as server:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=600)

        def ask(seed: int) -> tuple[float, float]:
            began = time.monotonic()
            prompt = [(seed * 7919 + i * 104729) % 4000 + 10 for i in range(64)]
            extra = {"ignore_eos": True}
            first = None
            stream = client.completions.create(
                model="m", prompt=prompt, max_tokens=TOKENS, stream=True, extra_body=extra
            )
            for _ in stream:
                first = first or time.monotonic()
            end = time.monotonic()
            assert first is not None
            return first - began, (end - first) / (TOKENS - 1)

        ask(0)
        single = [ask(i) for i in range(1, 3)]
        began = time.monotonic()
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(ask, range(10, 14)))
        together = time.monotonic() - began
        resident = server.resident_bytes()
    return {
        "ttft": statistics.median(t for t, _ in single),
        "tpot": statistics.median(t for _, t in single),
        "tokens_per_second_4": 4 * TOKENS / together,
        "resident": resident,
    }


def run() -> dict[str, Any]:
    from compress_methods import convert

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        make_llama(place / "bf16", ONE_B, 1, VOCABULARY)
        cases: dict[str, Path] = {"bf16": place / "bf16"}
        for name, fmt in FORMATS.items():
            recipe = {
                "formats": {"w": {"format": "integer", **fmt}},
                "modules": [{"match": "blocks", "format": "w", "algorithm": "rtn"}],
            }
            cases[name] = place / name
            convert(place / "bf16", recipe, cases[name], quiet=True)
        for name, model in cases.items():
            size = sum(f.stat().st_size for f in model.glob("*.safetensors"))
            rows.append({"format": name, "bytes": size, **measure(model)})
            print(rows[-1], file=sys.stderr, flush=True)
    return {"rows": rows}


def table(results: dict[str, Any]) -> str:
    base = results["rows"][0]
    other = base["resident"] - base["bytes"]
    heads = ("format", "weights", "in memory", "decode, 1 request", "first token, 64-token prompt")
    lines = [f"| {' | '.join(heads)} | 4 requests |", "|---|---|---|---|---|---|"]
    for row in results["rows"]:
        lines.append(
            f"| {row['format']} | {row['bytes'] / 1e9:.2f} GB "
            f"| {(row['resident'] - other) / 1e9:.2f} GB "
            f"| {base['tpot'] / row['tpot']:.2f}x | {base['ttft'] / row['ttft']:.2f}x "
            f"| {row['tokens_per_second_4'] / base['tokens_per_second_4']:.2f}x |"
        )
    lines.append(
        f"\nSpeed relative to bf16 ({1e3 * base['tpot']:.0f} ms per token, "
        f"{base['ttft']:.2f} s to the first, {base['tokens_per_second_4']:.1f} tokens/s of four)"
    )
    return "\n".join(lines)
