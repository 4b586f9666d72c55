"""A GPU: products with one matrix per format, and conversions of a block of an 8B model.

Products are ours in Triton, for what vLLM has no kernel for, and of 4-bit integers beside them,
against torch's in bfloat16 in the same run, the second-level cache emptied before each. One token
is also compared with a copy of as many bytes. Conversions are of one decoder block, on the GPU and
on the processor beside it: seconds and the most memory of the device. Needs an NVIDIA or AMD GPU,
no network and no vLLM; takes about seven minutes.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from compress_methods.formats import Format, Stored
from compress_methods.formats.dense import Dense
from compress_methods.formats.floats import Float
from compress_methods.formats.integer import Integer
from compress_methods.formats.lookup import Lookup
from compress_methods.formats.sparse import Sparse
from compress_methods.formats.trellis import Trellis
from compress_methods.formats.wrappers.lowrank import LowRank
from compress_methods.kernels import Want, matmul, prepare
from tests.benchmarks.conversion.memory import REPOSITORY, gptq, make_llama

SHAPES = {
    "7B, gate": (11008, 4096),
    "8B, down": (4096, 14336),
    "70B, gate and up": (57344, 8192),
}
TOKENS = (1, 8, 16, 64, 256, 1024)
INT8 = Integer(8, -1)
FORMATS: dict[str, Format] = {
    "int4": Integer(4, 128),
    "int2, mid": Integer(2, 128, levels="mid"),
    "lookup 4": Lookup(4, 128),
    "lookup 3": Lookup(3, 128),
    "lookup 2": Lookup(2, 128),
    "nf4": Lookup(4, 128, "nf4"),
    "mxfp4": Float("mxfp4"),
    "trellis 2": Trellis(2),
    "int4, rank 64": LowRank(64, Integer(4, 128)),
    "half of int8": Sparse(64, 128, INT8),
    "6:8 bf16": Sparse(6, 8, Dense("bfloat16")),
}
BLOCK_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 1}
SAMPLES, VOCABULARY = 32, 4096
ROWS_DRAWN = 256
"""Of a matrix, which repeats them: to fill all of it would take minutes."""


def device() -> torch.device:
    """The GPU, or an exit that says there is none."""
    if not torch.cuda.is_available():
        sys.exit("gpu needs a GPU that torch can use: torch.cuda.is_available() is false")
    return torch.device("cuda")


def stored(fmt: Format, rows: int, cols: int) -> Stored:
    """A matrix on the CPU; groups of rows repeat."""
    few = min(rows, ROWS_DRAWN)
    weight = torch.randn(few, cols, generator=torch.Generator().manual_seed(0))
    packed = fmt.pack(fmt.nearest(weight))
    repeats = -(-rows // few)
    whole = {}
    for name, spec in fmt.tensors(rows, cols).items():
        tensor = packed[name]
        if spec.rows_axis is not None:
            axis = spec.rows_axis.axis
            tensor = torch.cat([tensor] * repeats, axis).narrow(axis, 0, spec.shape[axis])
        whole[name] = tensor
    return Stored.whole(fmt, whole, (rows, cols))


def milliseconds(function: Callable[..., Any], *arguments: Any) -> float:
    """The median of calls, each with a cold cache."""
    from triton.testing import do_bench

    found: float = do_bench(lambda: function(*arguments), warmup=10, rep=40, return_mode="median")
    return found


def products(on: torch.device) -> list[dict[str, Any]]:
    rows = []
    for shape, (outputs, inputs) in SHAPES.items():
        dense = torch.randn(outputs, inputs, device=on, dtype=torch.bfloat16)
        x = torch.randn(max(TOKENS), inputs, device=on, dtype=torch.bfloat16)
        plain = {t: milliseconds(torch.matmul, x[:t], dense.T) for t in TOKENS}
        del dense
        for name, fmt in FORMATS.items():
            torch.cuda.empty_cache()
            matrix = stored(fmt, outputs, inputs).to(on)
            size = sum(tensor.nbytes for tensor in matrix.tensors.values())
            prepared = prepare(matrix, Want(dtype=torch.bfloat16))
            source = torch.empty(size, dtype=torch.uint8, device=on)
            copy = milliseconds(torch.empty_like(source).copy_, source)
            ours = {t: milliseconds(matmul, x[:t], prepared) for t in TOKENS}
            rows.append(
                {
                    "shape": shape,
                    "format": name,
                    "stored": fmt.to_dict(),
                    "kernel": prepared.kernel,
                    "bits": 8 * size / (outputs * inputs),
                    # A copy reads and writes.
                    "of_bandwidth": copy / 2 / ours[1],
                    "faster": {str(t): plain[t] / ours[t] for t in TOKENS},
                    "milliseconds": {str(t): ours[t] for t in TOKENS},
                }
            )
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def recipes() -> dict[str, dict[str, Any]]:
    start = gptq(SAMPLES)
    rule = start["modules"][0]
    refine = {"algorithm": "refine", "start": rule["algorithm"], "iterations": 20}
    sparse = {"format": "sparse", "n": 64, "m": 128, "values": {"format": "dense"}}
    return {
        "rtn": {**start, "modules": [{**rule, "algorithm": "rtn"}]},
        "gptq": start,
        "refine, 20 iterations": {**start, "modules": [{**rule, "algorithm": refine}]},
        "alps": {**start, "formats": {"w4": sparse}, "modules": [{**rule, "algorithm": "alps"}]},
    }


def conversions(places: tuple[str, ...]) -> list[dict[str, Any]]:
    from compress_methods import convert

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        text = place / "text.txt"
        text.write_text((REPOSITORY / "LICENSE").read_text() * 8)
        make_llama(place / "model", BLOCK_8B, 1, VOCABULARY)
        for name, recipe in recipes().items():
            for where in places if name in ("rtn", "gptq") else places[:1]:
                out = place / f"{name}-{where}"
                report = convert(
                    place / "model", recipe, out, calibration=text, device=where, quiet=True
                )
                run = report["run"]
                rows.append(
                    {
                        "algorithm": name,
                        "device": where,
                        "seconds": run["seconds"],
                        "peak_device_bytes": run["peak_device_bytes"],
                    }
                )
                print(rows[-1], file=sys.stderr, flush=True)
    return rows


def architecture(on: torch.device) -> str:
    """As `configs/hardware.yaml` names it."""
    if torch.version.hip:
        found: str = torch.cuda.get_device_properties(on).gcnArchName
        return found.partition(":")[0]
    return "sm{}{}".format(*torch.cuda.get_device_capability(on))


def run() -> dict[str, Any]:
    on = device()
    return {
        "card": torch.cuda.get_device_name(on),
        "architecture": architecture(on),
        "products": products(on),
        "conversions": conversions(("cuda", "cpu")),
    }


def table(results: dict[str, Any]) -> str:
    lines = [
        f"Relative to torch's bfloat16 on {results['card']}:",
        "",
        "| matrix | format | bits | of a copy's rate | "
        + " | ".join(f"{t} tokens" for t in TOKENS)
        + " |",
        "|---" * (4 + len(TOKENS)) + "|",
    ]
    for row in results["products"]:
        faster = " | ".join(f"{row['faster'][str(t)]:.2f}x" for t in TOKENS)
        lines.append(
            f"| {row['shape']} | {row['format']} | {row['bits']:.2f} "
            f"| {row['of_bandwidth']:.0%} | {faster} |"
        )
    lines += ["", "| one block of 8B | device | seconds | device memory |", "|---|---|---|---|"]
    for row in results["conversions"]:
        peak = row["peak_device_bytes"]
        lines.append(
            f"| {row['algorithm']} | {row['device']} | {row['seconds']:.0f} "
            f"| {'' if peak is None else f'{peak / 2**30:.1f} GiB'} |"
        )
    return "\n".join(lines)
