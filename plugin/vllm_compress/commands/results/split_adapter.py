"""`vllm-compress split-adapter DIR -o OUT`: low-rank factors as a LoRA adapter, and their base."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

DESCRIPTION = "Split a model in format `lowrank` into its base and a LoRA adapter."
EPILOG = """\
Writes OUT/base and OUT/adapter; together they are DIR. vLLM adds the adapter with its own kernels,
and one base serves with several adapters, or without.

examples:
  vllm-compress split-adapter out/int2-lowrank -o apart
  vllm serve apart/base --enable-lora --max-lora-rank 32 --lora-modules whole=apart/adapter
"""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("split-adapter", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("model", metavar="DIR", help="model directory, compressed in `lowrank`")
    parser.add_argument("-o", "--output", metavar="OUT", required=True, help="new directory")


def run(args: argparse.Namespace) -> int:
    from compress_methods.conversion.exchange.adapter import ADAPTER, BASE, split_adapter

    ranks = split_adapter(args.model, args.output)
    out = Path(args.output)
    print(
        f"{out / BASE}: the bases\n"
        f"{out / ADAPTER}: the factors of {len(ranks)} matrices, rank {max(ranks.values())} at most"
    )
    return 0
