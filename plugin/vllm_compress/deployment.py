"""The name of a deployment: the label that tells two of them apart on one dashboard.

It travels in an environment variable because vLLM starts its processes anew and has no other
channel that stays out of the compile cache's key. vLLM warns of any `VLLM_*` variable it does not
know, and refuses to start with `--fail-on-environ-validation`; `declare_environment` makes this
one known.
"""

from __future__ import annotations

import os
import re

from compress_methods.errors import CompressError

VARIABLE = "VLLM_COMPRESS_DEPLOYMENT"
_VALID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/@:+-]{0,127}")


def check_name(name: str, what: str) -> str:
    """`name`, if it can be a label's value; `what` is where it was said."""
    if not _VALID.fullmatch(name):
        raise CompressError(
            f"{what} is {name!r}, expected up to 128 letters, digits and ._/@:+- "
            "that start with a letter or digit"
        )
    return name


def deployment_name(served_model: str) -> str:
    """What the user called this deployment, else the name the model is served under."""
    return os.environ.get(VARIABLE, "").strip() or served_model


def declare_environment() -> None:
    """Tell vLLM that the variable exists. Idempotent; for every process that reads a config."""
    from vllm import envs

    # A constant: what vLLM reads here enters the compile cache's key, and a name changes no graph.
    envs.environment_variables.setdefault(VARIABLE, _constant)


def _constant() -> None:
    return None
