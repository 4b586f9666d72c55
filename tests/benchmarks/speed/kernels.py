"""Products with one matrix: ours per format against what torch and vLLM have on this machine.

Three layers of Llama models, 1 to 1024 tokens, all threads. Every kernel goes round copies of its
weights that together exceed `ROTATE_BYTES`, so they come from memory, and its figure is the median
over them. One token is compared with a plain read of as many bytes, `BUSY` tokens with the rate of
the integer multiplications alone, both measured in the same run. Where there is AMX, the first
layer is measured once more in a process whose contenders, ours too, do without it.
"""

from __future__ import annotations

import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.benchmarks.speed import without_amx

SHAPES = {
    "7B, gate": (11008, 4096),
    "8B, down": (4096, 14336),
    "1B, gate and up": (16384, 2048),
}
FULL = "7B, gate"
BASE = "bf16, vLLM (oneDNN)"
TOKENS = (1, 2, 4, 8, 16, 64, 256, 1024)
BUSY = 256
ROTATE_BYTES = 400 * 2**20
SECONDS = 0.3
READ_BYTES = 2**28
ROWS_DRAWN = 256
"""Of a matrix of ours, which repeats them: filling all of it would take minutes."""
PEAK_ROUNDS = 20_000_000
Product = Callable[[int, Tensor], Any]
Made = tuple[int, int, Product]


def copies_of(size: int) -> int:
    return -(-ROTATE_BYTES // size)


def bfloat16(rows: int, cols: int) -> Made:
    """Bytes, copies, and the product with copy i: what an uncompressed layer costs in torch."""
    size = 2 * rows * cols
    weights = [torch.randn(rows, cols).bfloat16() for _ in range(copies_of(size))]
    return size, len(weights), lambda i, x: torch.nn.functional.linear(x, weights[i])


def vllm_bfloat16(rows: int, cols: int) -> Made | None:
    """The same in vLLM, through oneDNN."""
    ops = vllm_ops("onednn_mm")
    if ops is None:
        return None
    size = 2 * rows * cols
    weight = torch.randn(rows, cols).bfloat16()
    handlers = [ops.create_onednn_mm(weight.t()) for _ in range(copies_of(size))]
    return size, len(handlers), lambda i, x: ops.onednn_mm(handlers[i], x, None)


def vllm_int4(rows: int, cols: int) -> Made | None:
    """4-bit weights in groups of 128 in vLLM: with AMX activations become 8 bits too."""
    ops = vllm_ops("cpu_gemm_wna16")
    if ops is None:
        return None
    size, groups = rows * cols // 2 + 2 * rows * cols // 128, cols // 128
    scales = (torch.rand(groups, rows) / 1000).bfloat16()
    if torch.cpu._is_amx_tile_supported() and not without_amx.is_asked_for():
        made = [
            ops.convert_weight_packed_scale_zp(
                random_words(cols, rows // 8),
                random_words(groups, rows // 8),
                scales,
                ops.CPUQuantAlgo.AWQ,
            )
            for _ in range(copies_of(size))
        ]

        def product(i: int, x: Tensor) -> Any:
            weight, zeros, factors = made[i]
            return ops.int4_scaled_mm_cpu(x, weight, zeros, factors, None)

        return size, len(made), product
    weights = [random_words(rows // 16, cols * 2) for _ in range(copies_of(size))]

    def exact_product(i: int, x: Tensor) -> Any:
        return ops.cpu_gemm_wna16(x, weights[i], scales, None, None, 8, "vec")

    return size, len(weights), exact_product


def random_words(rows: int, cols: int) -> Tensor:
    return torch.randint(-(2**31), 2**31, (rows, cols), dtype=torch.int32)


def vllm_w8a8(rows: int, cols: int) -> Made | None:
    """8-bit weights per row, activations quantized per token, through oneDNN."""
    ops = vllm_ops("onednn_scaled_mm")
    if ops is None:
        return None
    size = rows * cols + 4 * rows
    weight = torch.randint(-127, 128, (rows, cols), dtype=torch.int8)
    scales = torch.rand(rows) / 1000
    handlers = [
        ops.create_onednn_scaled_mm(weight.t(), scales, torch.bfloat16, True, False)
        for _ in range(copies_of(size))
    ]

    def product(i: int, x: Tensor) -> Tensor:
        codes, token_scales, _ = ops.onednn_scaled_int8_quant(x)
        out = torch.empty(len(x), rows, dtype=torch.bfloat16)
        ops.onednn_scaled_mm(handlers[i], codes, out, token_scales, None, None, None)
        return out

    return size, len(handlers), product


def vllm_ops(needed: str) -> Any:
    """vLLM's module of CPU operations, if it is installed and its build has the one needed."""
    try:
        from vllm import _custom_ops
        from vllm.platforms import current_platform
    except ImportError:
        return None
    current_platform.import_kernels()
    return _custom_ops if hasattr(torch.ops._C, needed) else None


def ours(kernel: str, **fmt: Any) -> Callable[[int, int], Made]:
    """The same for a kernel of our table and a format, integer unless it says otherwise."""

    def make(rows: int, cols: int) -> Made:
        from compress_methods.formats import Stored, format_from_dict
        from compress_methods.kernels import Want, matmul, prepare

        form = format_from_dict({"format": "integer", **fmt})
        some = form.pack(form.nearest(torch.randn(ROWS_DRAWN, cols)))
        tensors = {name: torch.cat([t] * (rows // ROWS_DRAWN)) for name, t in some.items()}
        stored = Stored.whole(form, tensors, (rows, cols))
        size = form.nbytes(rows, cols)
        want = Want(kernel=kernel)
        matrices = [prepare(stored, want) for _ in range(copies_of(size))]
        assert matrices[0].kernel == kernel
        return size, len(matrices), lambda i, x: matmul(x, matrices[i])

    return make


def half(m: int, **values: Any) -> dict[str, Any]:
    """Half of every m columns kept, integers unless `values` says otherwise."""
    return {"format": "sparse", "n": m // 2, "m": m, "values": {"format": "integer", **values}}


def rotated(**base: Any) -> dict[str, Any]:
    """Integers in a rotated basis: the product transforms inputs and outputs, too."""
    return {"format": "rotated", "base": {"format": "integer", **base}}


def lookup(name: str, table_rows: int = 16) -> dict[str, Any]:
    """A fixed table, or learned ones of as many bits as the name ends in."""
    kind = {"table": name} if name == "nf4" else {"table": "learned", "table_rows": table_rows}
    return {"format": "lookup", "bits": int(name[-1]), **kind}


def floats(kind: str) -> dict[str, Any]:
    return {"format": "float", "kind": kind}


TABLES = ("lookup2", "lookup3", "nf4")
CASES: dict[str, Callable[[int, int], Made | None]] = {
    "bf16, torch": bfloat16,
    BASE: vllm_bfloat16,
    "int4 g128, vLLM": vllm_int4,
    "w8a8, vLLM (oneDNN)": vllm_w8a8,
    "int4, torch": ours("torch_int4", bits=4, group_size=128),
    "int8, torch": ours("torch_int8", bits=8, group_size=-1),
    **{f"int{b} g128, cpu": ours("cpu", bits=b, group_size=128) for b in (2, 3, 4)},
    **{f"{name} g128, cpu": ours("cpu", **lookup(name)) for name in TABLES},
    **{f"trellis{b}, cpu": ours("cpu", format="trellis", bits=b) for b in (2, 3)},
    **{f"{kind}, cpu": ours("cpu", **floats(kind)) for kind in ("mxfp4", "nvfp4")},
    "fp8, cpu_exact": ours("cpu_exact", **floats("fp8")),
    "int4 g128 rotated, cpu": ours("rotated", **rotated(bits=4, group_size=128)),
    "int8 row, cpu": ours("cpu", bits=8, group_size=-1),
    "int8-dynamic, cpu": ours("cpu", bits=8, group_size=-1, activations="int8"),
    "half of int8, cpu": ours("cpu", **half(128, bits=8, group_size=-1)),
    "half of int4 g128, cpu": ours("cpu", **half(128, bits=4, group_size=128)),
}
MORE: dict[str, Callable[[int, int], Made | None]] = {
    "int4 g32, cpu": ours("cpu", bits=4, group_size=32),
    "2:4 of int8, cpu": ours("cpu", **half(4, bits=8, group_size=-1)),
    **{f"int{b} g128, cpu_exact": ours("cpu_exact", bits=b, group_size=128) for b in (2, 3, 4)},
    "int8 row, cpu_exact": ours("cpu_exact", bits=8, group_size=-1),
    **{f"{name} g128, cpu_exact": ours("cpu_exact", **lookup(name)) for name in TABLES},
    **{f"{kind}, cpu_exact": ours("cpu_exact", **floats(kind)) for kind in ("mxfp4", "nvfp4")},
    "lookup4 g128 by row, cpu": ours("cpu", **lookup("lookup4", table_rows=1)),
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


def peak_rate() -> float:
    """Operations/s of the integer multiplications of this machine's instruction set, all threads;
    0 where only plain C++ runs."""
    from compress_methods.kernels.cpu import build

    isa, threads = build.instruction_set(), torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "peak.so"
        flags = (*build.FLAGS, "-shared", *build.INSTRUCTION_SETS[isa], f"-I{build.SOURCES}")
        source = Path(__file__).with_name("peak.cpp")
        subprocess.run([build.compiler(), *flags, str(source), "-o", str(out)], check=True)
        function = ctypes.CDLL(str(out)).peak
    function.argtypes, function.restype = [ctypes.c_int64], ctypes.c_int64
    rates = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(3):
            began = time.perf_counter()
            operations = sum(pool.map(function, [PEAK_ROUNDS] * threads))
            rates.append(operations / (time.perf_counter() - began))
    return statistics.median(rates)


def run() -> dict[str, Any]:
    from compress_methods.kernels.cpu import build

    results = measure(SHAPES)
    if build.instruction_set() == "amx":
        code = (
            "import json; from tests.benchmarks.speed import kernels as k; "
            "print(json.dumps(k.measure({k.FULL: k.SHAPES[k.FULL]})))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | without_amx.VARIABLES,
            stdout=subprocess.PIPE,
            check=True,
        )
        results["without_amx"] = json.loads(done.stdout.splitlines()[-1])
    return results


def measure(shapes: dict[str, tuple[int, int]]) -> dict[str, Any]:
    """Every kernel on some of the shapes; those of `MORE` on the first only."""
    peak = peak_rate()
    rows = []
    for shape, (height, width) in shapes.items():
        for name, make in {**CASES, **(MORE if shape == FULL else {})}.items():
            try:
                made = make(height, width)
            except RuntimeError as problem:  # oneDNN has no bf16 product below AVX-512
                made = None
                print(f"{name}: {problem}", file=sys.stderr)
            if made is None:
                print(f"{name}: not in this vLLM on this machine", file=sys.stderr, flush=True)
                continue
            size, copies, product = made
            seconds = {
                tokens: median_seconds(copies, product, torch.randn(tokens, width).bfloat16())
                for tokens in TOKENS
            }
            row = {"shape": shape, "kernel": name, "bytes": size, "rotated": size * copies}
            rows.append({**row, "read": read_bandwidth(), "seconds": seconds})
            print(rows[-1], file=sys.stderr, flush=True)
    threads = torch.get_num_threads()
    return {"shapes": shapes, "rows": rows, "threads": threads, "peak": peak}


def of_shape(results: dict[str, Any], shape: str) -> list[dict[str, Any]]:
    """Rows of one shape, tokens as numbers again, and their speed relative to bf16: vLLM's, or
    torch's where vLLM has none."""
    rows = [row for row in results["rows"] if row["shape"] == shape]
    rows = [{**row, "seconds": {int(t): s for t, s in row["seconds"].items()}} for row in rows]
    base = next((row for row in rows if row["kernel"] == BASE), rows[0])["seconds"]
    return [{**row, "speed": {t: base[t] / row["seconds"][t] for t in TOKENS}} for row in rows]


def summary(results: dict[str, Any]) -> str:
    """The first shape, with and without AMX."""
    return table({**results, "shapes": {FULL: results["shapes"][FULL]}})


def table(results: dict[str, Any]) -> str:
    heads = "".join(f" {tokens} |" for tokens in TOKENS)
    lines = []
    for shape, (height, width) in results["shapes"].items():
        rows = of_shape(results, shape)
        base = next((row for row in rows if row["kernel"] == BASE), rows[0])
        times = ", ".join(f"{1e3 * base['seconds'][t]:.1f}" for t in TOKENS)
        lines.append(f"{height} x {width} ({shape}); {base['kernel']} takes {times} ms:\n")
        lines.append(f"| kernel | MB |{heads} of the read | of the peak |")
        lines.append("|---|---|" + "---|" * (len(TOKENS) + 2))
        for row in rows:
            cells = "".join(f" {row['speed'][t]:.2f}x |" for t in TOKENS)
            read = row["bytes"] / row["read"] / row["seconds"][1]
            busy = 2 * height * width * BUSY / row["seconds"][BUSY] / (results["peak"] or 1e99)
            last = f"{busy:.0%}" if multiplies_int8(row["kernel"]) else ""
            lines.append(
                f"| {row['kernel']} | {row['bytes'] / 1e6:.1f} |{cells} {read:.0%} | {last} |"
            )
        lines.append("")
    read = statistics.median(row["read"] for row in results["rows"])
    least = min(row["rotated"] for row in results["rows"])
    lines.append(
        f"Speed relative to {BASE}, {results['threads']} threads; columns are tokens. "
        f"Weights go round {least / 2**20:.0f} MiB or more. Of the read: one token against a plain "
        f"read ({read / 1e9:.1f} GB/s). Of the peak: {BUSY} tokens against the integer "
        f"multiplications alone ({results['peak'] / 1e12:.2f} Top/s)."
    )
    if "without_amx" in results:
        lines += ["\nWithout AMX:\n", table(results["without_amx"])]
    return "\n".join(lines)


def multiplies_int8(kernel: str) -> bool:
    return kernel.startswith("w8a8") or kernel.endswith(", cpu")


def plot(results: dict[str, Any], path: Path) -> None:
    """Speed by tokens of the kernels that all shapes have, one panel for each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shapes = results["shapes"]
    figure, panels = pyplot.subplots(1, len(shapes), figsize=(14, 4.6), sharey=True)
    for panel, (shape, (height, width)) in zip(panels, shapes.items(), strict=True):
        for row in of_shape(results, shape):
            if row["kernel"] in CASES:
                ours = row["kernel"].endswith("cpu")
                panel.plot(
                    TOKENS,
                    [row["speed"][t] for t in TOKENS],
                    "-" if ours else "--",
                    marker="o" if ours else None,
                    markersize=3,
                    label=row["kernel"],
                )
        panel.set(
            title=f"{height} x {width} ({shape})", xlabel="tokens", xscale="log", yscale="log"
        )
        panel.set_xticks(TOKENS, [str(t) for t in TOKENS])
        panel.minorticks_off()
        panel.set_yticks([0.5, 1, 2, 4, 8], ["0.5x", "1x", "2x", "4x", "8x"])
        panel.grid(alpha=0.3)
    panels[0].set_ylabel(f"speed relative to {BASE}")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=6, frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
