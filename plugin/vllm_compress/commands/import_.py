"""`vllm-compress import MODEL -o OUT`: re-pack what another tool quantized, without loss."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

from vllm_compress.commands.convert import add_source_arguments

DESCRIPTION = """\
Store a model that another tool quantized in formats of vllm-compress, number by number the same, so
that it is served with this plugin's kernels. Killed at any moment, the same command goes on."""
EPILOG = """\
read: compressed-tensors (pack-quantized, int-quantized, float-quantized, nvfp4, mxfp4), GPTQ (2, 3,
4 and 8 bits, desc_act, asymmetric), AWQ, FP8, bitsandbytes, HQQ, and GGUF, as a file or directory.
held exactly: integers in groups or rows of any scale (GPTQ, AWQ, compressed-tensors, int8 of
bitsandbytes, Q4_0, Q5_0, Q8_0), columns in any order, groups with a least value or zero point that
is a float (HQQ with axis 1, Q4_1, Q5_1, Q4_K, Q5_K), tables (NF4, FP4, IQ4_NL, IQ4_XS), FP8 by
tensor, row or 128 x 128, NVFP4 and MXFP4. Not held: groups of 16 (Q2_K, Q3_K, Q6_K), or that are
not in rows; `convert` reads them exactly, too.

examples:
  vllm-compress import ./model-gptq -o out/model
  vllm-compress import model.Q4_0.gguf -o out/model --inexact bfloat16

--json prints the contents of OUT/report.json, whose keys `--help` of inspect explains.
"""


def add_parser(subparsers: Any) -> None:
    from compress_methods.conversion.exchange.importing import INEXACT

    parser = subparsers.add_parser("import", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("model", metavar="MODEL", help="model directory, hub id or GGUF file")
    add_source_arguments(parser)
    parser.add_argument("-o", "--output", metavar="OUT", required=True, help="output directory")
    parser.add_argument(
        "--inexact",
        choices=INEXACT,
        default=INEXACT[0],
        help="what becomes of matrices that no format holds exactly: refused (default), unpacked "
        "in bfloat16, or rounded to 8 bits in groups of 32",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> int:
    from compress_methods import import_checkpoint
    from compress_methods.system.memory import return_large_blocks

    return_large_blocks()
    report = import_checkpoint(
        args.model,
        args.output,
        inexact=args.inexact,
        revision=args.revision,
        allow_pickle=args.allow_pickle,
        tensor_parallel_size=args.tensor_parallel_size,
        quiet=args.quiet,
    )
    print(json.dumps(report, indent=2) if args.json else _summary(report, Path(args.output)))
    return 0


def _summary(report: dict[str, Any], out: Path) -> str:
    exact: Counter[str] = Counter()
    rounded: Counter[str] = Counter()
    errors: dict[str, float] = {}
    for module in report["modules"].values():
        kind = module["format"]
        if module["algorithm"] == "repack":
            exact[kind] += 1
        else:
            rounded[kind] += 1
            errors[kind] = max(errors.get(kind, 0.0), module["weight_error"])
    lines = [f"{out}: {report['bytes_after'] / 1e6:,.1f} MB"]
    lines += [f"exact: {count} matrices as {kind}" for kind, count in exact.items()]
    lines += [
        f"rounded: {count} matrices to {kind}, relative error {errors[kind] ** 0.5:.1e} at most"
        for kind, count in rounded.items()
    ]
    dense = report.get("dense") or {}
    if dense:
        count = sum(found["matrices"] for found in dense.values())
        lines.append(f"unpacked or never packed: {count} matrices: {', '.join(sorted(dense))}")
    return "\n".join([*lines, f"serve it: vllm-compress serve {out}"])
