"""`vllm-compress convert MODEL -o OUT --recipe R`: compress a checkpoint offline."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

MOST_NOTES = 10
DRAFT = "-draft"
DESCRIPTION = """\
Compress a Hugging Face checkpoint, one decoder block at a time. Killed at any moment, the same
command goes on where it was. Nothing is downloaded unless MODEL is a hub id."""
EPILOG = """\
recipes that come along (a path to your own YAML works too):
{recipes}
--calibration takes .txt, or .jsonl and .parquet with rows of text, messages, conversations
(ShareGPT), instruction and output (Alpaca), or prompt and completion; given several times, it mixes
the files in equal parts. self:chat, self:code and self:long have the model write under prompts of
that kind, self without. Recipes that need text use what the model writes when none is given;
recipes that don't report perplexity and KL of text they held out where it is.

examples:
  vllm-compress convert meta-llama/Llama-3.2-1B -o out/int4 --recipe int4-gptq
  vllm-compress convert ./model -o ./model-w4 --recipe my.yaml --calibration chats.jsonl
  vllm-compress convert ./model -o ./model-w4 --recipe int4-gptq --calibration self:code
  vllm-compress convert ./model -o ./model-w8 --recipe int8 --draft int3-gptq
  torchrun --nproc-per-node 2 -m vllm_compress.cli convert ./model -o ./w4 --recipe int4-gptq

torchrun has several processes share the text and the matrices, each on a GPU of its own (cuda:N is
for one alone); one that fails ends all, and the same command continues. Of a recipe that trains
they share trainings and packings; what they cannot share the first does alone.

A recipe with `accept` publishes a result only if its loss is within the bounds, with 95% confidence
on held-out text; else its `fallback` recipes are tried. If none passes, OUT is left as it was found
and the exit code is 3.

--json prints the contents of OUT/report.json, whose keys `--help` of inspect explains; with exit
code 3 {{"gate": {{"tries": [...]}}}}, what was measured.
"""


def add_parser(subparsers: Any) -> None:
    from compress_methods.recipe.matching import recipe_summaries

    recipes = "".join(f"  {name:<21}{text}\n" for name, text in recipe_summaries().items())
    parser = subparsers.add_parser(
        "convert", description=DESCRIPTION, epilog=EPILOG.format(recipes=recipes)
    )
    add_job_arguments(parser)
    parser.add_argument("-o", "--output", metavar="OUT", required=True, help="output directory")
    add_device_argument(parser)
    parser.add_argument(
        "--forward-dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the model's forward passes on calibration text (default float32)",
    )
    parser.add_argument(
        "--export",
        metavar="LAYOUT",
        help="write another tool's layout (compressed-tensors, gptq), or a gguf file beside "
        "the result, if formats allow",
    )
    parser.add_argument(
        "--draft",
        metavar="NAME|FILE",
        help="recipe of a second, smaller result OUT-draft, which `serve --draft` has write ahead",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def add_job_arguments(parser: argparse.ArgumentParser, recipe_required: bool = True) -> None:
    """Add the arguments that convert and check share."""
    parser.add_argument("model", metavar="MODEL", help="model directory or Hugging Face id")
    parser.add_argument(
        "--recipe", metavar="NAME|FILE", required=recipe_required, help="recipe name or YAML file"
    )
    parser.add_argument(
        "--calibration",
        metavar="FILE|self:PRESET",
        action="append",
        help="text to calibrate on, instead of the recipe's; several are mixed",
    )
    add_source_arguments(parser)


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """Add those of whatever reads a model and writes one."""
    parser.add_argument(
        "--revision", metavar="REV", help="branch, tag or commit of a Hugging Face id"
    )
    parser.add_argument(
        "--tensor-parallel-size",
        type=_positive,
        default=1,
        metavar="N",
        help="refuse a result that N ranks could not share (default 1)",
    )
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="read pytorch_model.bin if there is nothing else",
    )


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    """Where tensors are computed."""
    parser.add_argument(
        "--device",
        default="auto",
        metavar="auto|cpu|cuda[:N]",
        help="where to compute (default: the first GPU, if there is one)",
    )


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, expected an integer from 1")
    return int(text)


def run(args: argparse.Namespace) -> int:
    from compress_methods.system.memory import return_large_blocks
    from compress_methods.system.processes import one_voice

    return_large_blocks()
    with one_voice():
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    from compress_methods.errors import NotAccepted
    from compress_methods.system.processes import is_first

    out, draft = Path(args.output), None
    try:
        report = _convert(args, args.recipe, out, args.export)
        if args.draft is not None:
            draft = out.with_name(out.name + DRAFT)
            _convert(args, args.draft, draft, None)
    except NotAccepted as problem:
        if args.json:
            print(json.dumps({"gate": {"tries": problem.tries}}, indent=2))
        raise
    if is_first():
        print(json.dumps(report, indent=2) if args.json else _summary(report, out, draft))
    return 0


def _convert(
    args: argparse.Namespace, recipe: str, out: Path, layout: str | None
) -> dict[str, Any]:
    from compress_methods import convert
    from compress_methods.formats import torch_dtype

    return convert(
        args.model,
        recipe,
        out,
        calibration=args.calibration,
        revision=args.revision,
        allow_pickle=args.allow_pickle,
        tensor_parallel_size=args.tensor_parallel_size,
        device=args.device,
        dtype=torch_dtype(args.forward_dtype),
        layout=layout,
        quiet=args.quiet,
    )


def _summary(report: dict[str, Any], out: Path, draft: Path | None) -> str:
    before, after = report["bytes_before"], report["bytes_after"]
    lines = [
        f"{out}: {before / 1e6:,.1f} MB -> {after / 1e6:,.1f} MB ({after / before:.1%}), "
        f"{report['bits_per_weight']:.2f} bits per weight"
    ]
    held = report["held_out"]
    if held:
        lines.append(f"held-out text: {_held_out(held)}")
    for tried in report.get("gate", {}).get("tries", ()):
        verdict = "accepted" if tried["accepted"] else "not accepted"
        lines.append(f"gate: {tried['recipe']}: {verdict}: {tried['said']}")
    lines += _notes(report)
    seconds, peak = report["run"]["seconds"], report["run"]["peak_memory_bytes"]
    lines.append(f"{seconds:.0f} s, peak memory {peak / 1e6:,.0f} MB")
    ahead = "" if draft is None else f" --draft {draft}"
    lines.append(f"serve it: vllm-compress serve {out}{ahead}")
    return "\n".join(lines)


def _held_out(held: dict[str, Any]) -> str:
    if "cosine" in held:
        return (
            f"cosine to the original's embeddings {held['cosine']:.5f}, of 95% of the texts "
            f"{held['cosine_p05']:.5f} or more"
        )
    if "decisions" in held:
        return f"KL {held['kl']:.5f} nats, same label {held['top1_agreement']:.1%}"
    return (
        f"perplexity {held['base_perplexity']:.3f} -> {held['perplexity']:.3f}, "
        f"KL {held['kl']:.5f} nats/token, same top token {held['top1_agreement']:.1%}"
    )


def _notes(report: dict[str, Any]) -> list[str]:
    """List what someone should look at: modules left dense, and rows of zeros."""
    lines = []
    dense = report.get("dense") or {}
    if dense:
        names = sorted(dense, key=lambda name: -dense[name]["bytes"])
        more = f" and {len(names) - MOST_NOTES} more" if len(names) > MOST_NOTES else ""
        size = sum(found["bytes"] for found in dense.values()) / 1e6
        lines.append(
            f"kept as they are: {sum(found['matrices'] for found in dense.values())} matrices, "
            f"{size:,.1f} MB: {', '.join(names[:MOST_NOTES])}{more}"
        )
    for key, what in (("unfit", "left dense"), ("regrouped", "smaller groups or padded")):
        found = report.get(key) or {}
        lines += [f"{what}: {name}: {why}" for name, why in list(found.items())[:MOST_NOTES]]
        if len(found) > MOST_NOTES:
            lines.append(f"and {len(found) - MOST_NOTES} more, all in report.json under {key}")
    calibration = report.get("calibration") or {}
    lines += [calibration[key] for key in ("note", "advice") if calibration.get(key)]
    empty = {n: m["zero_rows"] for n, m in report["modules"].items() if m.get("zero_rows")}
    if empty:
        first = next(iter(empty))
        lines.append(
            f"all-zero rows: {sum(empty.values()):,} in {len(empty)} modules, such as {first} "
            f"({empty[first]:,} of {report['modules'][first]['shape'][0]:,}); kept as zeros"
        )
    return lines
