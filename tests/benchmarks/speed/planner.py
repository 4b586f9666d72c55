"""The capacity planner against a real vLLM server: calibrated on one request at a time, it predicts
what 4, 8 and 16 at once get.

A random Llama of 1.2 billion parameters (Llama-3.2-1B shape) on this machine, bf16 and 4 bits;
prompts of 64 tokens, 32 generated, each client sending the next request when it has the last
answer. Tokens per second of all clients, median time per output token; weight and KV-cache bytes
against what the server reports. `COMPRESS_BENCH_FORMATS=int4` leaves bf16 out.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.benchmarks.conversion.memory import ONE_B, VOCABULARY, make_llama
from tests.e2e.support.server import VllmServer

PROMPT, OUTPUT, ROUNDS = 64, 32, 2
SECONDS = 65.0
CLIENTS = (4, 8, 16)
FORMATS = tuple(os.environ.get("COMPRESS_BENCH_FORMATS", "int4,bf16").split(","))
INT4 = {
    "formats": {"w": {"format": "integer", "bits": 4, "group_size": 128}},
    "modules": [{"match": "blocks", "format": "w", "algorithm": "rtn"}],
}


def compare(directory: Path, server: Any) -> dict[str, Any]:
    """Calibrate, predict, drive, for one served model."""
    from vllm_compress.operations.capacity.calibration import measure
    from vllm_compress.operations.capacity.calibration.fit import step_model
    from vllm_compress.operations.capacity.calibration.sources import load_calibration
    from vllm_compress.operations.capacity.footprint.memory import Layout, cache_of
    from vllm_compress.operations.capacity.footprint.shapes import load_shape
    from vllm_compress.operations.capacity.footprint.storage import as_it_is
    from vllm_compress.operations.capacity.hardware import find_hardware

    scheme = as_it_is(load_shape(str(directory)))
    machine = find_hardware("local")
    measure.SECONDS = SECONDS
    calibration = load_calibration(server.url, [scheme], [machine], quiet=True)
    step, basis = step_model(scheme, machine, Layout(), 2, calibration, scheme)
    assert basis == "measured"
    served = measure.inspect_server(measure.Client(server.url))
    assert served.blocks is not None
    cache = cache_of(scheme.shape, Layout(), "cpu", 2, machine.max_tokens)
    loads = []
    for clients in CLIENTS:
        predicted = predict(step, cache, served.blocks, clients)
        measured = drive(server.url, served.model, scheme.shape.vocabulary, clients)
        loads.append({"clients": clients, "predicted": predicted, "measured": measured})
        print(loads[-1], file=sys.stderr, flush=True)
    space = int(server.environment["VLLM_CPU_KVCACHE_SPACE"]) * 2**30
    return {
        "weights": {"predicted": scheme.weight_bytes, "served": served.weight_bytes},
        "kv_tokens": {
            "predicted": space // cache.page_bytes * cache.block,
            "served": served.blocks * (served.block or 0),
        },
        "calibration": calibration.tokens,
        "loads": loads,
    }


def predict(step: Any, cache: Any, blocks: int, clients: int) -> dict[str, float]:
    from vllm_compress.operations.capacity.throughput.load import Load
    from vllm_compress.operations.capacity.throughput.simulation import (
        Engine,
        percentile,
        simulate,
    )

    engine = Engine(2048, 32, blocks - 1, cache)
    out = simulate(step, engine, Load(PROMPT, OUTPUT, clients * ROUNDS, clients=clients))
    return {"tokens_per_second": out.tokens_per_second, "tpot": percentile(out.tpot, 0.5)}


def drive(url: str, model: str, vocabulary: int, clients: int) -> dict[str, float]:
    """The same load on the server."""
    from vllm_compress.operations.capacity.calibration.measure import Client, Prompts

    def client(seed: int) -> list[float]:
        prompts = Prompts(Client(url), model, vocabulary, seed)
        found = []
        for _ in range(ROUNDS):
            times = prompts.complete(PROMPT, OUTPUT, streamed=True)
            found.append((times[-1] - times[0]) / (OUTPUT - 1))
        return found

    began = time.monotonic()
    with ThreadPoolExecutor(clients) as pool:
        tpots = [t for each in pool.map(client, range(1, clients + 1)) for t in each]
    seconds = time.monotonic() - began
    rate = clients * ROUNDS * OUTPUT / seconds
    return {"tokens_per_second": rate, "tpot": statistics.median(tpots)}


def run() -> dict[str, Any]:
    from compress_methods import convert

    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        make_llama(place / "bf16", ONE_B, 1, VOCABULARY)
        if "int4" in FORMATS:
            convert(place / "bf16", INT4, place / "int4", quiet=True)
        for name in FORMATS:
            with VllmServer(place / name, "--dtype", "bfloat16") as server:
                rows[name] = compare(place / name, server)
    return {"rows": rows}


def table(results: dict[str, Any]) -> str:
    lines = ["| format | requests at once | tokens/s, predicted | measured | error "]
    lines[0] += "| time per token, predicted | measured | error |"
    lines.append("|---" * 8 + "|")
    for name, row in results["rows"].items():
        for load in row["loads"]:
            p, m = load["predicted"], load["measured"]
            cells = [name, str(load["clients"])]
            rates = (p["tokens_per_second"], m["tokens_per_second"])
            cells += [f"{rates[0]:.1f}", f"{rates[1]:.1f}", _error(*rates)]
            cells += [f"{1e3 * p['tpot']:.0f} ms", f"{1e3 * m['tpot']:.0f} ms"]
            lines.append("| " + " | ".join([*cells, _error(p["tpot"], m["tpot"])]) + " |")
    for name, row in results["rows"].items():
        for what in ("weights", "kv_tokens"):
            p, s = row[what]["predicted"], row[what]["served"]
            unit = "weight bytes" if what == "weights" else "tokens of KV cache in 1 GiB"
            lines.append(f"\n{name}: {p:,} {unit} predicted, {s:,} served ({_error(p, s)})")
    return "\n".join(lines)


def _error(predicted: float, measured: float) -> str:
    return f"{100 * (predicted / measured - 1):+.1f}%"
