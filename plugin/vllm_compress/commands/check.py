"""`vllm-compress check`: what will go wrong, before hours are spent on it.

Before converting (`--recipe`): the recipe against the model's headers, fused groups, group sizes
against columns and tensor-parallel slices, calibration text, memory, disk, time. Before serving:
headers against config, tensor-parallel slices, memory of a device, and which kernel will run here.
Reads headers, not weights.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from vllm_compress.commands.convert import add_job_arguments

DESCRIPTION = "Check a recipe against a model, or a compressed model against the place it will run."
EPILOG = """\
examples:
  vllm-compress check meta-llama/Llama-3.2-1B --recipe int4-gptq -o out/int4
  vllm-compress check out/int4 --tensor-parallel-size 4 --hardware h100-sxm

--json before converting: model, recipe, modules, bytes_before, bytes_after, disk, disk_free,
memory, memory_free (bytes), seconds; of several stages, stages (a line each); of a search, levels
(how many there are; bytes_after is that of the first) and bytes_after_least (of the last).
--json before serving: model, modules, bytes, bytes_per_device, formats, kernels (by format,
on this machine), device, device_memory (null without --hardware).
Exit code 0 when nothing is wrong, 2 with one line that says what is.
"""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("check", description=DESCRIPTION, epilog=EPILOG)
    add_job_arguments(parser, recipe_required=False)
    parser.add_argument("-o", "--output", metavar="OUT", default=".", help="where it would go")
    parser.add_argument("--hardware", metavar="NAME", help="a device of configs/hardware.yaml")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    result = _before_serving(args) if args.recipe is None else _before_converting(args)
    print(json.dumps(result, indent=2) if args.json else _lines(result))
    return 0


def _before_converting(args: argparse.Namespace) -> dict[str, Any]:
    import shutil

    from compress_methods.conversion.chain import load_chain
    from compress_methods.conversion.pipeline import (
        check_calibration,
        needs_calibration,
        statement,
    )
    from compress_methods.conversion.preflight import (
        estimate_stages,
        existing_parent,
        require_room,
    )
    from compress_methods.conversion.sampling import require_cached
    from compress_methods.conversion.search import find_levels
    from compress_methods.conversion.stages import open_stages
    from compress_methods.memory import available_bytes

    chain = load_chain(args.recipe)
    opening = (args.allow_pickle, args.tensor_parallel_size)
    levels = [] if chain.prune_to is None else find_levels(chain, (args.model, *opening))
    chain = levels[0].chain if levels else chain
    stages = open_stages(args.model, chain, *opening)
    source, plan = stages[0].opened.source, stages[-1].opened.plan
    calibrated = args.calibration is not None or bool(levels) or needs_calibration(stages)
    check_calibration(source.directory, chain.calibration, args.calibration)
    sampled = calibrated and args.calibration is None
    if sampled:
        require_cached(source)
    out = Path(args.output)
    expected = estimate_stages(stages, calibrated, sampled)
    # A search halves its levels and keeps the best result so far beside the one it is at.
    tries = len(levels).bit_length() or 1
    disk = expected.disk + (plan.compressed_bytes if tries > 1 else 0)
    require_room(disk, out)
    result = {
        "model": source.name,
        "recipe": chain.name,
        "modules": len(plan.jobs),
        "bytes_before": source.nbytes,
        "bytes_after": plan.compressed_bytes,
        "disk": disk,
        "disk_free": shutil.disk_usage(existing_parent(out)).free,
        "memory": expected.memory,
        "memory_free": available_bytes(),
        "seconds": round(tries * expected.seconds, 1),
    }
    if chain.transforms:
        result["stages"] = statement(stages).splitlines()[:-1]
    if levels:
        result |= {"levels": len(levels), "bytes_after_least": levels[-1].bytes}
    return result


def _before_serving(args: argparse.Namespace) -> dict[str, Any]:
    from compress_methods.compressed import open_compressed
    from compress_methods.errors import CheckpointError
    from compress_methods.loading import is_compressed
    from compress_methods.sharding import check_sharding
    from vllm_compress.capacity.hardware import find_hardware

    path = Path(args.model)
    if not path.is_dir():
        raise CheckpointError(f"{args.model}: no such directory")
    if not is_compressed(path):
        raise CheckpointError(f"{path}: not compressed by vllm-compress; to plan one give --recipe")
    checkpoint = open_compressed(path)
    ways = args.tensor_parallel_size
    check_sharding(checkpoint, ways)
    compressed = sum(m.nbytes for m in checkpoint.matrices.values())
    dense = sum(e.nbytes for e in checkpoint.dense.values())
    result = {
        "model": path.name,
        "modules": len(checkpoint.matrices),
        "bytes": compressed + dense,
        "bytes_per_device": compressed // ways + dense,
        "formats": sorted({m.format.describe() for m in checkpoint.matrices.values()}),
        "device": _device(),
        "kernels": _kernels(checkpoint),
        "device_memory": args.hardware and find_hardware(args.hardware).memory_bytes,
    }
    memory = result["device_memory"]
    if memory is not None and result["bytes_per_device"] > memory:
        raise CheckpointError(
            f"{path}: {result['bytes_per_device'] / 1e9:.1f} GB of weights per device, "
            f"{args.hardware} has {memory / 1e9:.1f} GB; raise --tensor-parallel-size"
        )
    return result


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _kernels(checkpoint: Any) -> dict[str, str]:
    """Kernel of our table that would run each format here; on GPUs vLLM's own come first."""
    import torch

    from compress_methods.kernels import choose

    device = torch.device(_device())
    found: dict[str, str] = {}
    for matrix in checkpoint.matrices.values():
        kernel = choose(matrix.format, matrix.rows, matrix.cols, device, gather=False)
        found.setdefault(matrix.format.describe(), kernel.name)
    return found


def _lines(result: dict[str, Any]) -> str:
    lines = []
    for key, value in result.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k}: {v}" for k, v in value.items())
        elif isinstance(value, list):
            value = ("\n" + " " * 18 if key == "stages" else ", ").join(value)
        elif isinstance(value, int) and ("bytes" in key or "disk" in key or "memory" in key):
            value = f"{value / 1e6:,.1f} MB"
        elif key == "seconds":
            value = f"about {value:,.0f} s on this machine"
        if value is not None:
            lines.append(f"{key.replace('_', ' '):<18}{value}")
    return "\n".join([*lines, "nothing wrong found"])
