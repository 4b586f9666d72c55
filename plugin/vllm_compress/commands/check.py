"""`vllm-compress check`: what will go wrong, before hours are spent on it.

Before converting (`--recipe`): the recipe against the model's headers, fused groups, group sizes
against columns and tensor-parallel slices, calibration text, memory, disk, time. Before serving:
headers against config, tensor-parallel slices, memory of a device, and which kernel will run here.
Reads headers and scales, no weights, except with `--deep`.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_compress.commands.convert import add_job_arguments

if TYPE_CHECKING:
    from compress_methods.checkpoint.compressed import CompressedCheckpoint
    from compress_methods.conversion.planning.plan import Plan
    from compress_methods.conversion.stages import Stage
    from compress_methods.formats import Format
    from compress_methods.recipe.stages import StagedRecipe

DESCRIPTION = "Check a recipe against a model, or a compressed model against the place it will run."
EPILOG = """\
examples:
  vllm-compress check meta-llama/Llama-3.2-1B --recipe int4-gptq -o out/int4
  vllm-compress check out/int4 --tensor-parallel-size 4 --hardware h100-sxm
  vllm-compress check out/int4 --deep
  vllm-compress check out/int8 --draft out/int3 --hardware l4

--json before converting: model, recipe, modules, bytes_before, bytes_after, disk, disk_free,
memory, memory_free (bytes), device_memory (null without --hardware), seconds, calibration (how much
of what text; null where none is used); advice, where it is short; note, where chats became text;
of several stages, stages (a line each); training, where there is some (a line each), which the
others leave out;
experts, of a mixture, where they can be served; of a search, levels (how many there are;
bytes_after is that of the first) and bytes_after_least (of the last).
--json before serving: model, modules, bytes, bytes_per_device, formats, kv_cache (null
without scales for one), kernels (by format,
on --hardware or else here), device, device_memory (null without --hardware), files (how many were
read against their checksums; null without --deep); with --draft: draft, draft_bytes, and what a
token keeps of the model and of both on a device, kv_bytes_per_token and kv_bytes_with_draft.
Exit code 0 when nothing is wrong, 2 with one line that says what is.
"""

EXPERTS = ".experts."
"""In names of their modules."""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("check", description=DESCRIPTION, epilog=EPILOG)
    add_job_arguments(parser, recipe_required=False)
    parser.add_argument("-o", "--output", metavar="OUT", default=".", help="where it would go")
    parser.add_argument("--hardware", metavar="NAME", help="a device of configs/hardware.yaml")
    parser.add_argument(
        "--deep", action="store_true", help="read every file of a result against its checksum"
    )
    parser.add_argument("--draft", metavar="DIR", help="with this result, what will draft for it")
    parser.add_argument(
        "--processes",
        type=int,
        default=1,
        metavar="N",
        help="of torchrun on this machine, for a recipe that trains (default 1)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    from vllm_compress.operations.capacity.hardware import find_hardware

    if args.hardware is not None:
        find_hardware(args.hardware)
    result = _before_serving(args) if args.recipe is None else _before_converting(args)
    print(json.dumps(result, indent=2) if args.json else _lines(result))
    return 0


def _before_converting(args: argparse.Namespace) -> dict[str, Any]:
    import shutil

    from compress_methods.calibration.self_generated import require_cached
    from compress_methods.checkpoint.source import at_revision
    from compress_methods.conversion import resources
    from compress_methods.conversion.job import check_calibration, needs_calibration, statement
    from compress_methods.conversion.planning.calibration import calibration_advice, settings_of
    from compress_methods.conversion.stages import open_stages
    from compress_methods.errors import CompressError
    from compress_methods.recipe.stages import load_staged
    from compress_methods.search.prune_to import find_levels
    from compress_methods.system.memory import available_bytes

    if args.deep or args.draft:
        raise CompressError("--deep and --draft are of a result; leave out --recipe")
    recipe = load_staged(args.recipe)
    model = at_revision(args.model, args.revision)
    opening = (args.allow_pickle, args.tensor_parallel_size)
    measured = _check_gate(recipe, (model, *opening))
    levels = [] if recipe.search is None else find_levels(recipe, (model, *opening))
    recipe = levels[0].recipe if levels else recipe
    stages = open_stages(model, recipe, *opening)
    source, plan = stages[0].planned.source, stages[-1].planned.plan
    settings = settings_of(stages)
    text = check_calibration(source.directory, settings, args.calibration)
    calibrated = text.asked or bool(levels) or measured or needs_calibration(stages)
    sampled = calibrated and text.tokens is None
    if sampled:
        require_cached(source)
    ways = args.tensor_parallel_size
    memory = _require_memory(source.name, plan.compressed_bytes // ways, args.hardware)
    out, advice = Path(args.output), calibration_advice(stages)
    expected = resources.estimate_stages(stages, calibrated, sampled)
    # A search halves its levels and keeps the best result so far beside the one it is at.
    tries = len(levels).bit_length() or 1
    disk = expected.disk + (plan.compressed_bytes if tries > 1 else 0)
    resources.require_room(disk, out)
    result: dict[str, Any] = {
        "model": source.name,
        "recipe": recipe.name,
        "modules": len(plan.jobs),
        **({"kv_cache": plan.recipe.kv_cache} if plan.recipe.kv_cache else {}),
        "bytes_before": source.nbytes,
        "bytes_after": plan.compressed_bytes,
        "disk": disk,
        "disk_free": shutil.disk_usage(resources.existing_parent(out)).free,
        "memory": expected.memory,
        "memory_free": available_bytes(),
        "device_memory": memory,
        "seconds": round(tries * expected.seconds, 1),
        "calibration": f"{settings.describe()}, {text.source}" if calibrated else None,
        **({"note": text.note} if text.note else {}),
        **({"advice": advice} if advice else {}),
    }
    if recipe.transforms:
        result["stages"] = statement(stages).splitlines()[:-1]
    if levels:
        result |= {"levels": len(levels), "bytes_after_least": levels[-1].bytes}
    return result | _training(recipe, stages, args.processes) | _experts(plan)


def _experts(plan: Plan) -> dict[str, str]:
    """Where experts can be served, if there are some."""
    from vllm_compress.handed import handed_kind

    found = {job.format for job in plan.jobs if job.slot.kind == "experts"}
    copies = (name for shard in plan.shards for name in shard.copies)
    known = len(found) == 1 and all(map(handed_kind, found)) and not _of_experts_bias(copies)
    return {"experts": "by vLLM's kernels on GPUs" if known else "on CPUs only"} if found else {}


def _training(recipe: StagedRecipe, stages: Sequence[Stage], count: int) -> dict[str, Any]:
    """What each training of a recipe takes, in each of `count` processes; the other numbers leave
    it out."""
    from compress_methods.conversion.resources import flops_per_second
    from compress_methods.training.cost import planned_of, require_memory
    from compress_methods.training.processes import require_shared
    from compress_methods.training.recover import require_trainer

    if not recipe.training:
        return {}
    require_trainer()
    each = " in each process" if count > 1 else ""
    flops, told = flops_per_second(), []
    for planned in planned_of(recipe, stages, count):
        training = planned.training
        require_shared(training, count)
        require_memory(planned, f"train {training.train}")
        told.append(
            f"{training.train} for {training.steps} steps: {planned.moved:,} values, about "
            f"{planned.memory / 1e6:,.1f} MB of memory{each} and {planned.seconds(flops):,.0f} s"
        )
    return {"training": told}


def _check_gate(recipe: StagedRecipe, opening: tuple[str | Path, bool, int]) -> bool:
    """Plan what a gate falls back to, and read its questions; tells whether it needs text."""
    from compress_methods.conversion.stages import open_stages
    from compress_methods.evaluation.tasks import require_task
    from compress_methods.search.prune_to import find_levels

    gate = recipe.accept
    if gate is None:
        return False
    if gate.task is not None:
        require_task(Path(gate.task.file))
    for other in recipe.fallback:
        if other.search is None:
            open_stages(opening[0], other, *opening[1:])
        else:
            find_levels(other, opening)
    return gate.reads_text


def _before_serving(args: argparse.Namespace) -> dict[str, Any]:
    from compress_methods.checkpoint.compressed import open_compressed
    from compress_methods.checkpoint.loading.model import (
        is_compressed,
        require_finite_values,
        require_whole,
    )
    from compress_methods.checkpoint.sharding import check_sharding
    from compress_methods.errors import CheckpointError

    path = Path(args.model)
    if not path.is_dir():
        raise CheckpointError(f"{args.model}: no such directory")
    if not is_compressed(path):
        raise CheckpointError(f"{path}: not compressed by vllm-compress; to plan one give --recipe")
    files = verify_files(path, args.json) if args.deep else None
    checkpoint = open_compressed(path)
    require_whole(path)
    require_finite_values(checkpoint, args.deep)
    ways = args.tensor_parallel_size
    check_sharding(checkpoint, ways)
    device = _device(args.hardware)
    _check_experts(checkpoint, device)
    compressed = sum(m.nbytes for m in checkpoint.matrices.values())
    dense = sum(e.nbytes for e in checkpoint.dense.values())
    result: dict[str, Any] = {
        "model": path.name,
        "modules": len(checkpoint.matrices),
        "bytes": compressed + dense,
        "bytes_per_device": compressed // ways + dense,
        "formats": sorted({m.format.describe() for m in checkpoint.matrices.values()}),
        "kv_cache": _kv_cache(checkpoint),
        "device": device,
        "kernels": _kernels(checkpoint, device),
        "files": files,
    }
    result |= _draft(path, args.draft, ways)
    needed = result["bytes_per_device"] + result.get("draft_bytes", 0) // ways
    return result | {"device_memory": _require_memory(str(path), needed, args.hardware)}


def _draft(path: Path, draft: str | None, ways: int) -> dict[str, Any]:
    """What a draft adds, if there is one: its weights, and its part of the KV cache."""
    if draft is None:
        return {}
    from compress_methods.checkpoint.compressed import open_compressed
    from compress_methods.checkpoint.loading.model import is_compressed, require_whole
    from compress_methods.checkpoint.sharding import check_sharding
    from vllm_compress.metrics.checkpoint_summary import quantization_method, summarize_checkpoint
    from vllm_compress.operations.draft import make_draft
    from vllm_compress.operations.kv_cache import kept_by

    made = make_draft(str(path), draft, None, ())
    if is_compressed(made.path):
        check_sharding(open_compressed(made.path), ways)
        require_whole(made.path)
    summary = summarize_checkpoint(draft, quantization_method(made.path))
    found: dict[str, Any] = {"draft": made.line(), "draft_bytes": summary.weight_bytes or 0}
    kept = [kept_by(models, ways, 2, None) for models in ([str(path)], [str(path), draft])]
    for name, each in zip(("kv_bytes_per_token", "kv_bytes_with_draft"), kept, strict=True):
        if each is not None:
            found[name] = each.block_bytes // each.block
    return found


def _kv_cache(checkpoint: CompressedCheckpoint) -> str | None:
    """What a server may store keys and values in, and how to ask for it."""
    from compress_methods.errors import CheckpointError

    if checkpoint.spec.kv_cache is None:
        return None
    kind, layers = checkpoint.spec.kv_cache, len(checkpoint.kv_scales) // 3
    for name, entry in checkpoint.kv_scales.items():
        if not float(entry.read()) > 0:
            raise CheckpointError(f"{entry.path}: {name} is {float(entry.read())}, expected more")
    return f"scales of {layers} layers for {kind}; serve with --kv-cache-dtype {kind}"


def _check_experts(checkpoint: CompressedCheckpoint, device: str) -> None:
    """`CheckpointError` where experts are compressed that the server would refuse."""
    from vllm_compress.handed import require_served_experts

    layers: dict[str, dict[str, Format]] = defaultdict(dict)
    for name, matrix in checkpoint.matrices.items():
        if EXPERTS in name:
            layers[name.partition(EXPERTS)[0]][name] = matrix.format
    has_bias, on_cpu = _of_experts_bias(checkpoint.dense), device == "cpu"
    for packed in layers.values():
        formats = set(packed.values())
        require_served_experts(next(iter(packed)), formats, on_cpu=on_cpu, has_bias=has_bias)


def _of_experts_bias(tensors: Iterable[str]) -> bool:
    """Whether one of the tensors is a bias of experts."""
    return any(EXPERTS in name and name.endswith("bias") for name in tensors)


def _require_memory(model: str, needed: int, hardware: str | None) -> int | None:
    """Bytes of memory a device has; `CheckpointError` if the weights on it take more."""
    from compress_methods.errors import CheckpointError
    from vllm_compress.operations.capacity.hardware import find_hardware

    if hardware is None:
        return None
    memory = find_hardware(hardware).memory_bytes
    if needed > memory:
        raise CheckpointError(
            f"{model}: {needed / 1e9:.1f} GB of weights per device, "
            f"{hardware} has {memory / 1e9:.1f} GB; raise --tensor-parallel-size"
        )
    return memory


def verify_files(path: Path, quiet: bool = False) -> int:
    """Read every file of a result against the checksums of its report; returns how many."""
    from compress_methods.checkpoint.integrity import FILES, read_report, require_intact
    from compress_methods.system.progress import Progress

    files = [path / name for name in read_report(path)[FILES]]
    total = sum(file.stat().st_size for file in files if file.is_file())
    with Progress(total, "verifying", quiet=quiet) as progress:
        require_intact(path, lambda file: progress.step(file.stat().st_size, file.name))
    return len(files)


def _device(hardware: str | None) -> str:
    """What it is to torch, or what this machine computes on."""
    import torch

    from vllm_compress.operations.capacity.hardware import find_hardware

    if hardware is not None:
        return "cpu" if find_hardware(hardware).kind == "cpu" else "cuda"
    return "cuda" if torch.cuda.is_available() else "cpu"


def _kernels(checkpoint: Any, device: str) -> dict[str, str]:
    """Kernel that would run each format there."""
    found: dict[str, str] = {}
    for matrix in checkpoint.matrices.values():
        fmt = matrix.format
        if fmt.describe() not in found:
            found[fmt.describe()] = _kernel(fmt, (matrix.rows, matrix.cols), device)
    return found


def _kernel(fmt: Any, shape: tuple[int, int], device: str) -> str:
    """Of one matrix, and of the format inside a wrapper. On GPUs vLLM's own come first; which of
    them it is, only vLLM knows, and only there."""
    from compress_methods.kernels import KERNELS, choose, kernel
    from vllm_compress.kernels import from_vllm_floats  # noqa: F401  (enters them in the table)
    from vllm_compress.kernels.from_vllm import FromVllm

    for name in KERNELS if device == "cuda" else ():
        entry = kernel(name)
        if isinstance(entry, FromVllm) and entry.takes(fmt):
            return name
    name = choose(_stand_in(fmt, shape, device)).name
    return name if fmt.inner is fmt else f"{name} ({_kernel(fmt.inner, shape, device)})"


def _stand_in(fmt: Any, shape: tuple[int, int], device: str) -> Any:
    """A matrix on a device that need not be here. Which kernel it is depends on shapes and device,
    not on values."""
    import torch

    from compress_methods.formats import MAIN_TENSOR, Stored

    class There(Stored):
        @property
        def device(self) -> torch.device:
            return torch.device(device)

    nothing = {MAIN_TENSOR: torch.empty(0)}
    return There.whole(fmt, nothing, shape)


def _lines(result: dict[str, Any]) -> str:
    lines = []
    for key, value in result.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k}: {v}" for k, v in value.items())
        elif isinstance(value, list):
            value = ("\n" + " " * 18 if key in ("stages", "training") else ", ").join(value)
        elif key.startswith("kv_bytes_"):
            value = f"{value:,} bytes"
        elif isinstance(value, int) and ("bytes" in key or "disk" in key or "memory" in key):
            value = f"{value / 1e6:,.1f} MB"
        elif key == "seconds":
            value = f"about {value:,.0f} s on this machine"
        if value is not None:
            lines.append(f"{key.replace('_', ' '):<18}{value}")
    return "\n".join([*lines, "nothing wrong found"])
