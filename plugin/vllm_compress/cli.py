"""`vllm-compress`: one command line for converting, checking, measuring and serving.

Each command is a module of `vllm_compress.commands` with `add_parser(subparsers)` and
`run(args) -> int`, imported only when it is asked for. An error the user can fix is one line on
stderr and exit code 2, 3 where a recipe's gate let no result pass; anything else is a defect of
ours and keeps its traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import Any, NoReturn

from compress_methods.errors import CompressError, named, nearest

PROGRAM = "vllm-compress"
COMMANDS = {
    "convert": "compress a model as a recipe says",
    "import": "store what another tool quantized in formats of vllm-compress",
    "recover": "train what compression lost back, towards the original",
    "check": "find what will go wrong before converting or serving",
    "inspect": "show formats, bytes and bits per weight of a model",
    "split-adapter": "write low-rank factors as a LoRA adapter beside their base",
    "split-scales": "write trained scales, served with the codes of their base",
    "eval": "measure what compression lost",
    "sensitivity": "measure what each layer would lose in each format",
    "plan": "say what hardware a model needs, before converting it",
    "serve": "serve a model with vLLM, metrics labelled per deployment",
    "gateway": "split a service's users between its variants",
    "rollout": "change the split of a running gateway",
    "drain": "take a variant's server out of service before it stops",
    "dashboard": "draw the metrics of deployments, alone and compared",
    "teach": "have a served model write training data for a smaller one",
    "compare": "replay prompts to two servers: is one as good as the other",
    "build-kernels": "compile the CPU kernels ahead of time",
}
FILES = {"import": "import_"}
"""Commands whose names are words of Python."""
ROOMS = {
    **dict.fromkeys(("gateway", "rollout", "drain"), "traffic."),
    **dict.fromkeys(("inspect", "split-adapter", "split-scales", "eval"), "results."),
}
DESCRIPTION = "Compress Hugging Face language models and serve them with stock vLLM."
EPILOG = """\
from a model to an endpoint:
  vllm-compress convert path/to/model --recipe int4-gptq -o out/int4
  vllm-compress inspect out/int4
  vllm-compress serve out/int4 --deployment int4 --port 8000

Compressed models also load in plain `vllm serve` wherever vllm-compress is installed.
`vllm-compress COMMAND --help` explains a command.
"""
UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, and whose options cannot be abbreviated."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"{PROGRAM}: error: {message}; see `{self.prog} --help`\n")

    def _print_message(self, message: str, file: Any = None) -> None:
        # argparse's own passes over what cannot be written.
        (file or sys.stderr).write(message or "")


class _Version(argparse.Action):
    """Looked up only when asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from vllm_compress.versions import own_version, vllm_version

        print(f"{PROGRAM} {own_version()} (vLLM {vllm_version() or 'not installed'})")
        parser.exit()


def build_parser(chosen: ModuleType | None, name: str | None) -> Parser:
    """The parser of all commands, with the arguments of the chosen one only."""
    parser = Parser(prog=PROGRAM, description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("--version", action=_Version, nargs=0, help="show versions and exit")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for command, text in COMMANDS.items():
        if chosen is not None and command == name:
            chosen.add_parser(subparsers)
        else:
            subparsers.add_parser(command, help=text, add_help=False)
    return parser


def load_command(name: str) -> ModuleType:
    """The module of a command."""
    if name not in COMMANDS:
        raise CompressError(f"unknown command {name!r}; {nearest(name, COMMANDS)}")
    module = (
        f"{__package__}.commands.{ROOMS.get(name, '')}{FILES.get(name, name.replace('-', '_'))}"
    )
    try:
        return import_module(module)
    except ModuleNotFoundError as problem:
        if problem.name != module:
            raise
        raise CompressError(f"{name} is not part of this installation") from problem


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the return value is the process's exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    with contextlib.suppress(
        AttributeError
    ):  # a name that is not UTF-8 can be printed all the same
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        try:
            return _dispatch(arguments)
        finally:
            sys.stdout.flush()
    except CompressError as problem:
        print(f"{PROGRAM}: error: {problem}", file=sys.stderr)
        return problem.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader went away (`| head`). Python would complain again when it flushes at exit.
        _discard_output()
        return FAILED
    except OSError as problem:
        if problem.errno is None:  # no word of the system's
            raise
        # Such as a full disk behind standard output, which Python would try to write to at exit.
        where = "standard output" if problem.errno in UNWRITABLE else "the system says"
        print(f"{PROGRAM}: error: {named(problem, where)}", file=sys.stderr)
        _discard_output()
        return USAGE


def _discard_output() -> None:
    """What is still to be written goes nowhere."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _dispatch(arguments: list[str]) -> int:
    name = arguments[0] if arguments and not arguments[0].startswith("-") else None
    module = None if name is None else load_command(name)
    parser = build_parser(module, name)
    parsed = parser.parse_args(arguments)
    if module is None:
        parser.print_help()
        return OK
    code: int = module.run(parsed)
    return code


if __name__ == "__main__":
    sys.exit(main())
