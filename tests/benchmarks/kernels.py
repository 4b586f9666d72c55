"""Products with one matrix: ours per format against what torch and vLLM have on this machine.

11008 x 4096, 1 to 256 tokens, all threads. Every kernel goes round copies of its weights that
together exceed `ROTATE_BYTES`, so they come from memory, and its figure is the median over them.
One token is compared with a plain read of as many bytes, measured in the same run.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

ROWS, COLS = 11008, 4096
TOKENS = (1, 4, 16, 64, 256)
ROTATE_BYTES = 400 * 2**20
SECONDS = 0.6
READ_BYTES = 2**28
Product = Callable[[int, Tensor], Any]


def bfloat16() -> tuple[int, int, Product]:
    """Bytes, copies, and the product with copy i: what an uncompressed layer costs."""
    size = 2 * ROWS * COLS
    copies = -(-ROTATE_BYTES // size)
    weights = [torch.randn(ROWS, COLS).bfloat16() for _ in range(copies)]
    return size, copies, lambda i, x: torch.nn.functional.linear(x, weights[i])


def ours(kernel: str, **fmt: Any) -> Callable[[], tuple[int, int, Product]]:
    """The same for a kernel of our table and a format, integer unless it says otherwise."""

    def make() -> tuple[int, int, Product]:
        from compress_methods.formats import Prepared, format_from_dict
        from compress_methods.kernels import KERNELS

        chosen, form = KERNELS[kernel], format_from_dict({"format": "integer", **fmt})
        specs = form.tensors(ROWS, COLS)
        weight = torch.randn(ROWS, COLS)
        stored = form.pack(form.nearest(weight))
        size = sum(spec.nbytes for spec in specs.values())
        copies = -(-ROTATE_BYTES // size)
        matrices = [
            Prepared(
                kernel, chosen.prepare(form, [stored[n] for n in specs], ROWS, COLS), ROWS, COLS
            )
            for _ in range(copies)
        ]
        return size, copies, lambda i, x: chosen.matmul(form, x, matrices[i], None)

    return make


def half(m: int, **values: Any) -> dict[str, Any]:
    """Half of every m columns kept, integers unless `values` says otherwise."""
    return {"format": "sparse", "n": m // 2, "m": m, "values": {"format": "integer", **values}}


CASES: dict[str, Callable[[], tuple[int, int, Product]]] = {
    "bf16": bfloat16,
    "int4, torch": ours("torch_int4", bits=4, group_size=128),
    "int8, torch": ours("torch_int8", bits=8, group_size=-1),
    **{f"int{b} g128, cpu": ours("cpu", bits=b, group_size=128) for b in (2, 3, 4)},
    "int8 row, cpu": ours("cpu", bits=8, group_size=-1),
    "int4 g32, cpu": ours("cpu", bits=4, group_size=32),
    **{f"int{b} g128, cpu_exact": ours("cpu_exact", bits=b, group_size=128) for b in (2, 3, 4)},
    "int8 row, cpu_exact": ours("cpu_exact", bits=8, group_size=-1),
    "half of int8, cpu": ours("cpu", **half(128, bits=8, group_size=-1)),
    "2:4 of int8, cpu": ours("cpu", **half(4, bits=8, group_size=-1)),
    "half of int4 g128, cpu": ours("cpu", **half(128, bits=4, group_size=128)),
    "half of int8, cpu_exact": ours("cpu_exact", **half(128, bits=8, group_size=-1)),
    "half of bf16, cpu_exact": ours("cpu_exact", **half(128, format="dense")),
}


def median_seconds(copies: int, product: Product, x: Tensor) -> float:
    product(0, x)
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - began < SECONDS:
        start = time.perf_counter()
        product(len(times) % copies, x)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def read_bandwidth() -> float:
    """Bytes/s at which all threads together sum int64 values from memory."""
    data = torch.ones(READ_BYTES // 8, dtype=torch.int64)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        data.sum()
        times.append(time.perf_counter() - start)
    return READ_BYTES / statistics.median(times)


def run() -> dict[str, Any]:
    rows = []
    for name, make in CASES.items():
        size, copies, product = make()
        seconds = {
            tokens: median_seconds(copies, product, torch.randn(tokens, COLS).bfloat16())
            for tokens in TOKENS
        }
        rows.append({"kernel": name, "bytes": size, "read": read_bandwidth(), "seconds": seconds})
        print(rows[-1], file=sys.stderr, flush=True)
    return {"rows": rows, "threads": torch.get_num_threads()}


def table(results: dict[str, Any]) -> str:
    heads = "".join(f" {tokens} |" for tokens in TOKENS)
    lines = [f"| kernel | MB |{heads} of the read |", "|---|---|" + "---|" * (len(TOKENS) + 1)]
    base = {int(t): s for t, s in results["rows"][0]["seconds"].items()}
    for row in results["rows"]:
        seconds = {int(t): s for t, s in row["seconds"].items()}
        cells = "".join(
            f" {1e3 * seconds[t]:.2f} ms, {base[t] / seconds[t]:.2f}x |" for t in TOKENS
        )
        fraction = row["bytes"] / row["read"] / seconds[1]
        lines.append(f"| {row['kernel']} | {row['bytes'] / 1e6:.1f} |{cells} {fraction:.0%} |")
    read = statistics.median(row["read"] for row in results["rows"])
    lines.append(
        f"\n{ROWS} x {COLS}, {results['threads']} threads, columns are tokens: time, and speed "
        f"relative to bf16. Plain read {read / 1e9:.1f} GB/s; the last column is the share of it "
        f"that one token reaches."
    )
    return "\n".join(lines)
