"""Speed of real vLLM servers, one after another in one run: bf16, every number of bits,
half of int8 and int4, and vLLM's own int4 where it has one.

A random Llama of 1.2 billion parameters (Llama-3.2-1B shape, vocabulary 128,256), round to nearest,
since speed does not depend on the values. Embedding and output head are one matrix, in 8 bits where
the blocks are and in 4 bits below. Eager, all cores; prompts of 64 tokens, then `TOKENS` generated
greedily, by 1, 4 and 16 requests at once, and one prompt of 1,000. Only ratios carry over.
Where there is AMX, bf16 and both int4 are measured once more without it (`without_amx`).
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.benchmarks.conversion.memory import ONE_B, VOCABULARY, make_llama
from tests.benchmarks.speed import without_amx
from tests.benchmarks.speed.kernels import half
from tests.e2e.support.ready import ServerError
from tests.e2e.support.server import VllmServer

TOKENS, LONG = 16, 1000
CLIENTS = (1, 4, 16)
HEADS = {bits: {"bits": bits, "group_size": group} for bits, group in ((8, -1), (4, 128))}
FORMATS: dict[str, dict[str, Any]] = {
    "int8": {"bits": 8, "group_size": -1},
    "int8-dynamic": {"bits": 8, "group_size": -1, "activations": "int8"},
    "int4": {"bits": 4, "group_size": 128},
    "int3": {"bits": 3, "group_size": 128},
    "int2": {"bits": 2, "group_size": 128},
    "half of int8": half(128, bits=8, group_size=-1),
    "half of int4": half(128, bits=4, group_size=128),
}


class Asker:
    """Requests to one server; times in seconds."""

    def __init__(self, url: str) -> None:
        from openai import OpenAI

        self.client = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=1200)

    def ask(self, seed: int, length: int = 64, tokens: int = TOKENS) -> tuple[float, float]:
        """Time to the first token and per token after it."""
        began = time.monotonic()
        prompt = [(seed * 7919 + i * 104729) % 4000 + 10 for i in range(length)]
        first = None
        stream = self.client.completions.create(
            model="m",
            prompt=prompt,
            max_tokens=tokens,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        for _ in stream:
            first = first or time.monotonic()
        end = time.monotonic()
        assert first is not None
        return first - began, (end - first) / max(tokens - 1, 1)

    def together(self, clients: int, seed: int) -> dict[str, float]:
        """As many requests at once, twice where there is one: medians, and tokens/s of all."""
        rounds = 2 if clients == 1 else 1
        began = time.monotonic()
        with ThreadPoolExecutor(clients) as pool:
            times = list(pool.map(self.ask, range(seed, seed + clients * rounds)))
        seconds = time.monotonic() - began
        return {
            "clients": clients,
            "ttft": statistics.median(t for t, _ in times),
            "tpot": statistics.median(t for _, t in times),
            "tokens_per_second": clients * rounds * TOKENS / seconds,
        }


def measure(model: Path, environment: dict[str, str]) -> dict[str, Any]:
    """Loads by clients, and seconds of a long prompt."""
    options = ("--served-model-name", "m", "--dtype", "bfloat16", "--max-model-len", "1280")
    with VllmServer(model, *options, env=environment) as server:
        asker = Asker(server.url)
        asker.ask(0)
        loads = [asker.together(clients, 100 * clients) for clients in CLIENTS]
        long = asker.ask(1, LONG, 1)[0]
        return {"loads": loads, "long_prompt": long}


def recipe_of(name: str) -> dict[str, Any]:
    fmt = FORMATS[name]
    head = HEADS[8 if fmt.get("values", fmt)["bits"] == 8 else 4]
    return {
        "formats": {"w": {"format": "integer", **fmt}, "head": {"format": "integer", **head}},
        "modules": [
            {"match": "blocks", "format": "w", "algorithm": "rtn"},
            {"match": ["embedding", "lm_head"], "format": "head", "algorithm": "rtn"},
        ],
    }


def run() -> dict[str, Any]:
    from compress_methods import convert

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        make_llama(place / "bf16", ONE_B, 1, VOCABULARY)
        cases: dict[str, tuple[Path, dict[str, str]]] = {"bf16": (place / "bf16", {})}
        for name in FORMATS:
            convert(place / "bf16", recipe_of(name), place / name, quiet=True)
            cases[name] = (place / name, {})
        cases["int4, vLLM's kernel"] = (place / "int4", {"VLLM_COMPRESS_KERNEL": "vllm"})
        results: dict[str, Any] = {"rows": measure_all(cases, {})}
        if without_amx.has_amx():
            few = {name: cases[name] for name in ("bf16", "int4", "int4, vLLM's kernel")}
            plain = without_amx.environment(place / "plugin")
            results["rows_without_amx"] = measure_all(few, plain)
    return results


def measure_all(
    cases: dict[str, tuple[Path, dict[str, str]]], common: dict[str, str]
) -> list[dict[str, Any]]:
    """One server after another; without those that this machine does not run."""
    rows = []
    for name, (model, environment) in cases.items():
        size = sum(f.stat().st_size for f in model.glob("*.safetensors"))
        try:
            measured = measure(model, {**common, **environment})
        except ServerError:
            if not environment:
                raise
            print(f"{name}: not on this machine", file=sys.stderr, flush=True)
            continue
        rows.append({"format": name, "bytes": size, **measured})
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


def table(results: dict[str, Any]) -> str:
    parts = [table_of(results["rows"])]
    if "rows_without_amx" in results:
        parts += ["The same without AMX:", table_of(results["rows_without_amx"])]
    return "\n\n".join(parts)


def table_of(rows: list[dict[str, Any]]) -> str:
    """Of servers on the same instructions, the first of them bf16."""
    base = rows[0]
    heads = ["format", "weights"]
    heads += [f"decode, {n} request{'s' * (n > 1)}" for n in CLIENTS]
    heads += ["first token, 64-token prompt", f"{LONG:,}-token prompt"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        pairs = list(zip(base["loads"], row["loads"], strict=True))
        speeds = [b["tpot"] / r["tpot"] for b, r in pairs]
        speeds += [pairs[0][0]["ttft"] / pairs[0][1]["ttft"]]
        speeds += [base["long_prompt"] / row["long_prompt"]]
        lines.append(
            f"| {row['format']} | {row['bytes'] / 1e9:.2f} GB "
            + "".join(f"| {speed:.2f}x " for speed in speeds)
            + "|"
        )
    loads = base["loads"]
    times = ", ".join(f"{1e3 * load['tpot']:.0f}" for load in loads)
    rates = ", ".join(f"{load['tokens_per_second']:.1f}" for load in loads)
    lines.append(
        f"\nSpeed relative to bf16: {times} ms per token of {', '.join(map(str, CLIENTS))} "
        f"requests ({rates} tokens/s of all), {loads[0]['ttft']:.2f} s to the first token, "
        f"{base['long_prompt']:.1f} s for the long prompt."
    )
    return "\n".join(lines)


def plot(results: dict[str, Any], path: Path) -> None:
    """Tokens/s of each format by requests at once."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = results["rows"]
    figure, panel = pyplot.subplots(figsize=(9, 4))
    width = 0.8 / len(CLIENTS)
    for at, clients in enumerate(CLIENTS):
        places = [i + (at - 1) * width for i in range(len(rows))]
        rates = [1 / row["loads"][at]["tpot"] for row in rows]
        bars = panel.bar(places, rates, width, label=f"{clients} request{'s' * (clients > 1)}")
        panel.bar_label(bars, fmt="%.1f", fontsize=6)
    panel.set_xticks(range(len(rows)), [row["format"] for row in rows], fontsize=8)
    panel.set_ylabel("decode, tokens/s of each request")
    panel.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
