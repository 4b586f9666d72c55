"""Dividing what is too much to be held at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def portions(items: Iterable[T], size: Callable[[T], int], limit: int) -> Iterator[list[T]]:
    """Items in their order, as many at a time as come to `limit` together; one that alone comes to
    more is a portion of its own."""
    portion: list[T] = []
    held = 0
    for item in items:
        if portion and held + size(item) > limit:
            yield portion
            portion, held = [], 0
        portion.append(item)
        held += size(item)
    if portion:
        yield portion
