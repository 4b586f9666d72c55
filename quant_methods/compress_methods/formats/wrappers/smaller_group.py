"""The same format with a smaller `group_size`, for matrices whose columns the recipe's does not
divide, such as the 576 of SmolLM2-135M."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

from compress_methods.errors import FormatError
from compress_methods.formats.base import Format

HALVINGS = (1, 2, 3)


def smaller_groups(fmt: Format) -> Iterator[Format]:
    """With a half, a quarter and an eighth of its group, where the format takes such a size."""
    for halvings in HALVINGS:
        smaller = _halved(fmt, halvings)
        if smaller is not None:
            yield smaller


def _halved(fmt: Format, halvings: int) -> Format | None:
    """Of the format itself, or of the one that its values are stored in."""
    if not dataclasses.is_dataclass(fmt):
        return None
    for each in dataclasses.fields(fmt):
        value = getattr(fmt, each.name)
        changed: Any = None
        if each.name == "group_size" and isinstance(value, int) and value > 0:
            changed = value >> halvings
        elif isinstance(value, Format):
            changed = _halved(value, halvings)
        if changed:
            with contextlib.suppress(FormatError):
                return dataclasses.replace(fmt, **{each.name: changed})
    return None


def group_of(fmt: Format) -> int:
    """`group_size` of the format or of the one that its values are stored in; 0 without one."""
    found = getattr(fmt, "group_size", 0)
    if found or not dataclasses.is_dataclass(fmt):
        return int(found)
    inner = [getattr(fmt, each.name) for each in dataclasses.fields(fmt)]
    return next((group_of(value) for value in inner if isinstance(value, Format)), 0)
