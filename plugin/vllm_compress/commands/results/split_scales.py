"""`vllm-compress split-scales DIR --base BASE -o OUT`: trained scales apart from their codes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

DESCRIPTION = "Write what `recover --train scales` has changed, to be served with the base's codes."
EPILOG = """\
Any number of such sets share one base; vLLM puts one in place of the base's scales as it loads it.

examples:
  vllm-compress recover out/int2 --teacher path/to/model --train scales --loss ce \\
    --data task.jsonl -o trained
  vllm-compress split-scales trained --base out/int2 -o task
  vllm serve out/int2 --load-format vllm_compress \\
    --model-loader-extra-config '{"scales": "task"}'
"""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("split-scales", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("model", metavar="DIR", help="model trained from BASE")
    parser.add_argument("--base", metavar="BASE", required=True, help="compressed model it was")
    parser.add_argument("-o", "--output", metavar="OUT", required=True, help="new directory")


def run(args: argparse.Namespace) -> int:
    from compress_methods.checkpoint.compressed import read_entries
    from compress_methods.conversion.exchange.scales import split_scales

    sizes = split_scales(args.model, args.base, args.output)
    size = sum(sizes.values())
    whole = sum(entry.nbytes for entry in read_entries(Path(args.base)).values())
    print(f"{args.output}: {len(sizes)} tensors, {size:,} bytes, {size / whole:.1%} of the model")
    return 0
