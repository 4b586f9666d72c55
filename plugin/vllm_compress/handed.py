"""Which experts vLLM's own kernels multiply on GPUs; imported without torch, for plans."""

from __future__ import annotations

from collections.abc import Iterable

from compress_methods.errors import CheckpointError
from compress_methods.formats import Format
from compress_methods.formats.floats import FP8, Float
from compress_methods.formats.integer import Integer


def handed_kind(fmt: Format) -> str | None:
    """Which of vLLM's methods for experts multiplies a format on GPUs: `wna16`, `int8` or `fp8`;
    None where there is none."""
    if isinstance(fmt, Integer):
        if fmt.activations is None:
            return "wna16" if fmt.holds_zero else None
        return "int8" if (fmt.bits, fmt.group_size, fmt.symmetric) == (8, -1, True) else None
    if isinstance(fmt, Float) and fmt.kind == FP8 and fmt.activations == FP8:
        return "fp8" if fmt.group_size < 0 or fmt.group_rows > 1 else None
    return None


def require_served_experts(
    module: str, formats: Iterable[Format], *, on_cpu: bool, has_bias: bool = False
) -> None:
    """`CheckpointError` where compressed experts, `module` among them, are ones that no server
    takes: on GPUs those of a layer need one format that vLLM has a method for."""
    found = sorted({fmt.describe() for fmt in formats})
    if on_cpu or (len(found) == 1 and not has_bias and all(map(handed_kind, formats))):
        return
    what = ", ".join(found) + (" with biases" if has_bias else "")
    raise CheckpointError(
        f"{module}: experts in {what} are served on CPUs only; convert again with one format for "
        "all experts that GPUs have a kernel for (integers, or fp8 with activations: fp8), or "
        "a rule that keeps them as they are"
    )
