"""`vllm-compress recover DIR --teacher MODEL -o OUT`: train what compression lost back."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from vllm_compress.commands.convert import add_device_argument

DESCRIPTION = """\
Train a compressed or pruned checkpoint towards its original, whose predictions are the goal, and
write it anew: the same files, formats and sizes, other values. Held-out text decides which step is
kept. Killed at any moment, the same command goes on where it was. Needs the extra `train`."""
EPILOG = """\
--train says what may move:
  scales   scales, norms and biases; codes stay (PEQA). For quantized models: quick and safe
  distill  every value stored as a float. For pruned models, which are plain ones
  sft      the same, by the tokens of --data alone: text, or what `vllm-compress teach` has written
  qat      scales and codes. An experiment: not yet seen to win more than scales

examples:
  vllm-compress recover out/int2 --teacher path/to/model -o out/int2-scales
  vllm-compress recover out/depth25 --teacher path/to/model -o out/healed --train distill
  vllm-compress recover out/healed --teacher path/to/model -o out/taught --train sft \\
    --data answers.jsonl --sequences 2000 --length 512
  torchrun --nproc-per-node 4 -m vllm_compress.cli recover out/depth25 --teacher path/to/model \\
    -o out/healed --train distill    # four GPUs or machines' cores; each has the whole student
  torchrun --nproc-per-node 4 -m vllm_compress.cli recover out/depth25 --teacher path/to/model \\
    -o out/healed --train distill --shard    # each has a share of it, and of the teacher
"""


def add_parser(subparsers: Any) -> None:
    from compress_methods.recipe.training import Training

    parser = subparsers.add_parser("recover", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("model", metavar="DIR", help="checkpoint to train")
    parser.add_argument("--teacher", metavar="MODEL", required=True, help="its original")
    parser.add_argument("-o", "--output", metavar="OUT", required=True, help="output directory")
    parser.add_argument("--train", default="scales", choices=("scales", "distill", "sft", "qat"))
    parser.add_argument(
        "--loss",
        default="",
        metavar="kl|reverse_kl|jsd:B|ce|topk_kl",
        help="by what (default kl, of sft ce)",
    )
    parser.add_argument(
        "--data", metavar="FILE|self:PRESET", help="text; the teacher writes it unless given"
    )
    parser.add_argument("--rate", type=float, help="learning rate (default: the method's)")
    parser.add_argument(
        "--on-policy",
        type=float,
        metavar="SHARE",
        help="of the steps, those on text that the student writes itself (default 0)",
    )
    parser.add_argument(
        "--teacher-mix",
        type=float,
        metavar="SHARE",
        help="of that text's tokens, those that the teacher draws (MiniLLM; default 0)",
    )
    parser.add_argument(
        "--lora",
        type=int,
        metavar="RANK",
        help="train adapters of this rank and merge them (distill and sft; default 0, none)",
    )
    parser.add_argument(
        "--match",
        metavar="hidden:W,attention:W",
        help="inner states to match as well, with their weights (default none)",
    )
    for name, what in (
        ("steps", "steps of training"),
        ("batch", "sequences per step"),
        ("sequences", "sequences to learn from"),
        ("held-out", "sequences to stop by, and as many to report on"),
        ("length", "tokens per sequence"),
        ("seed", "of text and order"),
    ):
        default = getattr(Training, name.replace("-", "_"))
        parser.add_argument(f"--{name}", type=int, metavar="N", help=f"{what} (default {default})")
    _add_memory(parser)
    add_device_argument(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def _add_memory(parser: argparse.ArgumentParser) -> None:
    """Options for where memory is short."""
    parser.add_argument(
        "--top-k",
        type=int,
        metavar="K",
        help="learn from the teacher's K likeliest tokens, written down first (default 0, all)",
    )
    parser.add_argument(
        "--gradient-checkpointing",
        action="store_true",
        default=None,
        help="compute blocks twice, in less memory",
    )
    parser.add_argument(
        "--shard",
        action="store_true",
        default=None,
        help="divide what is trained, and the teacher's blocks, among torchrun's processes (FSDP); "
        "not with qat, --match or --on-policy",
    )


def run(args: argparse.Namespace) -> int:
    from compress_methods.system.processes import one_voice

    with one_voice():
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    from compress_methods import recover
    from compress_methods.recipe.training import parse_training
    from compress_methods.system.processes import is_first

    keys = [
        *("steps", "batch", "sequences", "held_out", "length", "seed", "rate", "data"),
        *("on_policy", "teacher_mix", "lora", "top_k", "gradient_checkpointing", "shard"),
    ]
    given = {key: value for key in keys if (value := getattr(args, key)) is not None}
    block = {"train": args.train, "loss": _loss(args.loss), **given}
    if args.match is not None:
        block["match"] = dict(_weighed(part) for part in args.match.split(","))
    settings = parse_training(block, "recover")
    report = recover(
        args.model, args.teacher, args.output, settings, device=args.device, quiet=args.quiet
    )
    if is_first():
        print(json.dumps(report, indent=2) if args.json else _summary(report, Path(args.output)))
    return 0


def _loss(text: str) -> Any:
    """`jsd:0.5` as recipes write it."""
    return dict([_weighed(text)]) if ":" in text else text


def _weighed(text: str) -> tuple[str, Any]:
    """`hidden:1.0` as a key and its number; what is none is left to the recipe's check."""
    name, _, number = text.partition(":")
    try:
        return name, float(number)
    except ValueError:
        return name, number


def _summary(report: dict[str, Any], out: Path) -> str:
    facts = report["training"][-1]
    before, after = facts["before"], facts["held_out"]
    lines = [
        f"{out}: step {facts['best']} of {facts['steps']} kept",
        f"held-out text: KL {before['kl']:.5f} -> {after['kl']:.5f} nats/token, perplexity "
        f"{before['perplexity']:.3f} -> {after['perplexity']:.3f} "
        f"(original {after['base_perplexity']:.3f})",
        *([facts["note"]] if facts["note"] else []),
        f"serve it: vllm-compress serve {out}",
    ]
    return "\n".join(lines)
