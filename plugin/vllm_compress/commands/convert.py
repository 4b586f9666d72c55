"""`vllm-compress convert MODEL -o OUT --recipe R`: compress a checkpoint offline."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

MOST_NOTES = 10
DESCRIPTION = """\
Compress a Hugging Face checkpoint, one decoder block at a time. Killed at any moment, the same
command goes on where it was. Nothing is downloaded unless MODEL is a hub id."""
EPILOG = """\
recipes that come along (a path to your own YAML works too):
{recipes}
--calibration takes .txt, .jsonl (`text`, or chat `messages`) or .parquet. Recipes that need it use
text sampled from the model itself when none is given; recipes that don't then also report the
perplexity and KL of text they held out.

examples:
  vllm-compress convert meta-llama/Llama-3.2-1B -o out/int4 --recipe int4-gptq
  vllm-compress convert ./model -o ./model-w4 --recipe my.yaml --calibration chats.jsonl

--json prints the contents of OUT/report.json, whose keys `--help` of inspect explains.
"""


def add_parser(subparsers: Any) -> None:
    from compress_methods.conversion.names import recipe_summaries

    recipes = "".join(f"  {name:<14}{text}\n" for name, text in recipe_summaries().items())
    parser = subparsers.add_parser(
        "convert", description=DESCRIPTION, epilog=EPILOG.format(recipes=recipes)
    )
    add_job_arguments(parser)
    parser.add_argument("-o", "--output", metavar="OUT", required=True, help="output directory")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def add_job_arguments(parser: argparse.ArgumentParser, recipe_required: bool = True) -> None:
    """What convert and check share."""
    parser.add_argument("model", metavar="MODEL", help="model directory or Hugging Face id")
    parser.add_argument(
        "--recipe", metavar="NAME|FILE", required=recipe_required, help="recipe name or YAML file"
    )
    parser.add_argument("--calibration", metavar="FILE", help="text to calibrate on")
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


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, expected an integer from 1")
    return int(text)


def run(args: argparse.Namespace) -> int:
    from compress_methods import convert

    report = convert(
        args.model,
        args.recipe,
        args.output,
        calibration=args.calibration,
        allow_pickle=args.allow_pickle,
        tensor_parallel_size=args.tensor_parallel_size,
        quiet=args.quiet,
    )
    print(json.dumps(report, indent=2) if args.json else _summary(report, Path(args.output)))
    return 0


def _summary(report: dict[str, Any], out: Path) -> str:
    before, after = report["bytes_before"], report["bytes_after"]
    lines = [
        f"{out}: {before / 1e6:,.1f} MB -> {after / 1e6:,.1f} MB ({after / before:.1%}), "
        f"{report['bits_per_weight']:.2f} bits per weight"
    ]
    held = report["held_out"]
    if held:
        lines.append(
            f"held-out text: perplexity {held['base_perplexity']:.3f} -> {held['perplexity']:.3f}, "
            f"KL {held['kl']:.5f} nats/token, same top token {held['top1_agreement']:.1%}"
        )
    lines += _notes(report)
    seconds, peak = report["run"]["seconds"], report["run"]["peak_memory_bytes"]
    lines.append(f"{seconds:.0f} s, peak memory {peak / 1e6:,.0f} MB")
    lines.append(f"serve it: vllm-compress serve {out}")
    return "\n".join(lines)


def _notes(report: dict[str, Any]) -> list[str]:
    """What someone should look at: modules left dense and rows of nothing but zeros."""
    unfit = report.get("unfit") or {}
    lines = [f"left dense: {name}: {why}" for name, why in list(unfit.items())[:MOST_NOTES]]
    if len(unfit) > MOST_NOTES:
        lines.append(f"and {len(unfit) - MOST_NOTES} more, all in report.json under unfit")
    empty = {n: m["zero_rows"] for n, m in report["modules"].items() if m.get("zero_rows")}
    if empty:
        first = next(iter(empty))
        lines.append(
            f"all-zero rows: {sum(empty.values()):,} in {len(empty)} modules, such as {first} "
            f"({empty[first]:,} of {report['modules'][first]['shape'][0]:,}); kept as zeros"
        )
    return lines
