"""`vllm-compress sensitivity MODEL`: what every layer loses in each format, before converting."""

from __future__ import annotations

import argparse
import json
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress_methods.system.words import size_text
from vllm_compress.commands.convert import add_device_argument
from vllm_compress.operations.text_table import align

if TYPE_CHECKING:
    from collections.abc import Sequence

    from compress_methods.search.sensitivity import Sensitivity

DEFAULT = "auto-3.5"
DESCRIPTION = """\
Measure how much the predictions of a model change when one group of matrices, those that vLLM runs
as one, is stored in each format of a recipe: KL to the model as it is, in nats per token, on
calibration text. Takes about as long as a conversion for every format; nothing is converted."""
EPILOG = """\
examples:
  vllm-compress sensitivity ./model --calibration chats.jsonl
  vllm-compress sensitivity ./model --recipe mine.yaml --formats w3,w4 --picture layers.png

--json prints one object with the keys
  model, recipe                 what was measured, and by the formats of which recipe
  groups                        for each layer and group: layer, group, modules, weights, and by
                                format bytes, bits_per_weight, drift (||h' - h||^2 / ||h||^2 of the
                                layer's output h) and kl
  totals                        by format, of all groups: bytes, bits_per_weight, kl (the sum)
"""
HEADER = ("layer", "group", "weights")


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("sensitivity", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("model", metavar="MODEL", help="model directory or Hugging Face id")
    parser.add_argument(
        "--revision", metavar="REV", help="branch, tag or commit of a Hugging Face id"
    )
    parser.add_argument(
        "--recipe",
        metavar="NAME|FILE",
        default=DEFAULT,
        help=f"the formats, and the algorithm that fills them (default {DEFAULT})",
    )
    parser.add_argument("--formats", metavar="NAME,...", help="of the recipe's formats only these")
    parser.add_argument("--calibration", metavar="FILE", help="text to measure on")
    parser.add_argument("--picture", metavar="FILE", help="write a PNG: a panel per format")
    parser.add_argument(
        "--work",
        metavar="DIR",
        help="keep what is measured there: the same command goes on where it was killed",
    )
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="read pytorch_model.bin if there is nothing else",
    )
    add_device_argument(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")


def run(args: argparse.Namespace) -> int:
    from compress_methods.checkpoint.source import at_revision
    from compress_methods.conversion.running import Running
    from compress_methods.errors import OutputError
    from compress_methods.evaluation.heatmap import draw_sensitivity
    from compress_methods.model.device import resolve_device
    from compress_methods.recipe.stages import load_staged
    from compress_methods.search.sensitivity import measure_sensitivity, totals
    from compress_methods.system.memory import return_large_blocks

    if args.picture is not None and not Path(args.picture).absolute().parent.is_dir():
        raise OutputError(f"{args.picture}: no such directory to write it to")
    return_large_blocks()
    recipe = load_staged(args.recipe)
    running = Running(resolve_device(args.device), quiet=args.quiet)
    with ExitStack() as stack:
        work = args.work or stack.enter_context(tempfile.TemporaryDirectory())
        rows = measure_sensitivity(
            at_revision(args.model, args.revision),
            recipe,
            Path(work) / "sensitivity",
            formats=args.formats.split(",") if args.formats else (),
            calibration=args.calibration,
            allow_pickle=args.allow_pickle,
            running=running,
        )
    name = Path(args.model).name
    if args.picture is not None:
        draw_sensitivity(Path(args.picture), _losses(rows), f"{name}, formats of {recipe.name}")
    if args.json:
        groups = [row.to_dict() for row in rows]
        block = {"model": name, "recipe": recipe.name, "groups": groups, "totals": totals(rows)}
        print(json.dumps(block, indent=2))
    else:
        print(render(rows))
    return 0


def _losses(rows: Sequence[Sensitivity]) -> dict[str, dict[tuple[int, str], float]]:
    """KL by format, then by layer and group."""
    found: dict[str, dict[tuple[int, str], float]] = {}
    for row in rows:
        for name, cost in row.formats.items():
            found.setdefault(name, {})[row.layer, row.group] = cost.kl
    return found


def render(rows: Sequence[Sensitivity]) -> str:
    """The table for people: KL of every group and format."""
    from compress_methods.search.sensitivity import totals

    names = list(_losses(rows))
    lines = [(*HEADER, *names)]
    for row in rows:
        cells = (_cell(row.formats[n].kl) if n in row.formats else "" for n in names)
        lines.append((str(row.layer), row.group, f"{row.weights:,}", *cells))
    found = totals(rows)
    weights = f"{sum(row.weights for row in rows):,}"
    kinds = (
        ("sum of KL", lambda total: _cell(total["kl"])),
        ("bits a weight", lambda total: f"{total['bits_per_weight']:.2f}"),
        ("bytes", lambda total: size_text(round(total["bytes"]))),
    )
    for what, say in kinds:
        cells = (say(found[n]) if n in found else "" for n in names)
        lines.append(("", what, weights, *cells))
    return "\n".join([*align(lines, (HEADER.index("group"),)), "", "KL in nats a token"])


def _cell(kl: float) -> str:
    return f"{kl:.2e}" if kl < 0.001 else f"{kl:.5f}"
