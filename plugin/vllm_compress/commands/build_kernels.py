"""`vllm-compress build-kernels`: compile the CPU kernels ahead of time, for images and slow starts.

They are otherwise compiled the first time a server needs them, which takes seconds and a compiler.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

from compress_methods.errors import CompressError
from vllm_compress.names import CACHE_VARIABLE

DESCRIPTION = "Compile the CPU kernels now instead of when a server first needs them."
EPILOG = """\
examples:
  vllm-compress build-kernels                  for this machine
  vllm-compress build-kernels --all            for every instruction set, as images want
  vllm-compress build-kernels -o /opt/kernels  there; serve with VLLM_COMPRESS_CACHE=/opt/kernels

Without -o they go where a server looks: VLLM_COMPRESS_CACHE, else vllm-compress in the user's
cache. CXX chooses the compiler. Prints the path of each library.
"""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("build-kernels", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("-o", "--output", metavar="DIR", help="where to put them")
    parser.add_argument("--all", action="store_true", help="for other processors, too")


def run(args: argparse.Namespace) -> int:
    from compress_methods.kernels.cpu import build

    if args.output:
        os.environ[CACHE_VARIABLE] = args.output
    try:
        for isa in build.INSTRUCTION_SETS if args.all else [build.instruction_set()]:
            print(build.build(isa))
    except build.BuildError as problem:
        raise CompressError(str(problem)) from problem
    return 0
