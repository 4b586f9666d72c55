"""Where the time of a step goes in vLLM: a random Llama of 1.2 billion parameters in bf16 and int4.

Decoding of one request, of 16, and one prompt of 1,000 tokens; offline, eager, all cores, each
format in a process of its own. Hooks around vLLM's modules measure each kind; what is left of the
model is its own Python, of the step scheduling, inputs and outputs. Hooks take some microseconds
per module, which count for what surrounds it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.benchmarks.conversion.memory import ONE_B, REPOSITORY, VOCABULARY, make_llama
from tests.benchmarks.speed.serving import recipe_of
from tests.e2e.support.engine import OFFLINE
from tests.e2e.support.server import ENVIRONMENT

SHORT, LONG, STEPS = 64, 1000, 12
MODEL, ENGINE = "rest of the model", "vLLM's engine"
KINDS = {
    "LinearBase": "products",
    "LogitsProcessor": "output head",
    "Attention": "attention",
    "RMSNorm": "norms",
    "RotaryEmbeddingBase": "rotary",
    "SiluAndMul": "activation",
    "VocabParallelEmbedding": "embedding",
    "Sampler": "sampler",
}
LOADS = {"decode, 1 request": (1, SHORT), "decode, 16 requests": (16, SHORT)}
PROMPT = f"prompt of {LONG:,}"


class Clock:
    """Seconds by kind of module, without those of hooked modules inside it."""

    def __init__(self, model: Any, sampler: Any) -> None:
        self.spent: Counter[str] = Counter()
        self._inside = [0.0]
        self._began: list[float] = []
        for module in (*model.modules(), sampler):
            names = [kind.__name__ for kind in type(module).__mro__]
            kind = next((KINDS[name] for name in names if name in KINDS), None)
            if kind or module is model:
                module.register_forward_pre_hook(self._begin)
                module.register_forward_hook(self._end(kind or MODEL))

    def _begin(self, *_: Any) -> None:
        self._inside.append(0.0)
        self._began.append(time.perf_counter())

    def _end(self, kind: str) -> Any:
        def hook(*_: Any) -> None:
            seconds = time.perf_counter() - self._began.pop()
            self.spent[kind] += seconds - self._inside.pop()
            self._inside[-1] += seconds

        return hook


def steps(engine: Any, clock: Clock, requests: int, length: int) -> list[dict[str, float]]:
    """Seconds by kind of the prompts' step and of every step after it."""
    from vllm import SamplingParams

    settings = SamplingParams(temperature=0, max_tokens=STEPS + 1, ignore_eos=True)
    for seed in range(requests):
        prompt = [(seed * 7919 + i * 104729) % 4000 + 10 for i in range(length)]
        engine.add_request(f"{time.monotonic()}-{seed}", {"prompt_token_ids": prompt}, settings)
    out = []
    while engine.has_unfinished_requests():
        clock.spent.clear()
        began = time.perf_counter()
        engine.step()
        seconds = time.perf_counter() - began
        out.append({**clock.spent, ENGINE: seconds - clock.spent.total()})
    return out


def mean(measured: list[dict[str, float]]) -> dict[str, float]:
    return {kind: sum(m[kind] for m in measured) / len(measured) for kind in measured[0]}


def work(model: str, out: str) -> None:
    """In the process of one format."""
    from vllm import LLM

    llm = LLM(
        model,
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=LONG + 2 * SHORT,
        max_num_batched_tokens=2048,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    (clock,) = llm.collective_rpc(lambda w: Clock(w.model_runner.model, w.model_runner.sampler))
    engine = llm.llm_engine
    steps(engine, clock, 1, SHORT)
    results = {
        name: mean(steps(engine, clock, *load)[1 : STEPS + 1]) for name, load in LOADS.items()
    }
    results[PROMPT] = steps(engine, clock, 1, LONG)[0]
    Path(out).write_text(json.dumps(results))


def run() -> dict[str, Any]:
    from compress_methods import convert

    results = {}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        make_llama(place / "bf16", ONE_B, 1, VOCABULARY)
        convert(place / "bf16", recipe_of("int4"), place / "int4", quiet=True)
        for name in ("bf16", "int4"):
            command = [sys.executable, "-m", "tests.benchmarks.speed.profile", str(place / name)]
            subprocess.run(
                [*command, str(place / "out.json")],
                env={**os.environ, **ENVIRONMENT, **OFFLINE},
                cwd=REPOSITORY,
                stdout=sys.stderr,
                check=True,
            )
            results[name] = json.loads((place / "out.json").read_text())
    return {"formats": results}


def table(results: dict[str, Any]) -> str:
    formats = results["formats"]
    columns = [(name, load) for load in (*LOADS, PROMPT) for name in formats]
    lines = ["| ms | " + " | ".join(f"{load}: {name}" for name, load in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    totals = [sum(formats[name][load].values()) for name, load in columns]
    for kind in (*KINDS.values(), MODEL, ENGINE):
        cells = []
        for (name, load), total in zip(columns, totals, strict=True):
            seconds = formats[name][load].get(kind, 0.0)
            cells.append(f"{1e3 * seconds:.2f}, {seconds / total:.1%}")
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    lines.append(f"| together | {' | '.join(f'{1e3 * total:.1f}' for total in totals)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    work(*sys.argv[1:])
