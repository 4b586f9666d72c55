"""Matrices whose rows vLLM's model class moves while it loads them.

A class does so by the name of a tensor or by an attribute of its parameter, and knows dense weights
and a few formats. Rows of ours can be moved the same way only where every stored tensor has them
along its first axis, in units that the move leaves whole; anything else would be served wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compress_methods.errors import FormatError
from compress_methods.formats import Format
from compress_methods.model.architecture import WHOLE_HEADS, architecture_of


def how_moved(module: str, config: Any) -> str | None:
    """How vLLM moves the rows of a module of this model (config.json's contents or transformers'
    config); None where it leaves them, as those of a vision tower with leaves of the same names."""
    if "vision" in module:
        return None
    return architecture_of(config).moved_rows.get(module.rpartition(".")[2])


def check_order(module: str, shape: tuple[int, int], fmt: Format, config: Any) -> None:
    """Raise `FormatError` where vLLM would move rows that the format cannot have moved."""
    how = how_moved(module, config)
    if how is None:
        return
    # Heads move as a whole, so units of rows inside one may stay packed together.
    whole = head_rows(config) if how == WHOLE_HEADS else 1
    for name, spec in fmt.tensors(*shape).items():
        axis = spec.rows_axis
        if axis is None or axis.axis != 0 or whole % axis.every:
            raise FormatError(
                f"{module}: vLLM moves its rows while loading, which {name} of "
                f"{fmt.describe()} does not allow; keep it as it is or choose a symmetric integer "
                "format"
            )


def head_rows(config: Any) -> int:
    """Rows of one attention head."""

    def get(*names: str) -> int | None:
        found = config.get if isinstance(config, Mapping) else lambda n: getattr(config, n, None)
        return next((value for value in map(found, names) if value), None)

    hidden, heads = get("hidden_size", "n_embed"), get("num_attention_heads", "n_head")
    return get("head_dim") or (hidden or 1) // (heads or 1)
