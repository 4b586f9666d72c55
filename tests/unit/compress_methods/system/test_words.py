"""Sizes and times read the same everywhere."""

from __future__ import annotations

import pytest

from compress_methods.system.words import duration, size_text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (200, "3 min 20 s"),
        (3599.6, "1 h 00 min"),
        (7500, "2 h 05 min"),
    ],
)
def test_durations_are_readable(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [(512, "0.5 KiB"), (2**20, "1.0 MiB"), (16785920, "16.0 MiB"), (3 * 2**29, "1.50 GiB")],
)
def test_sizes_are_readable(size: int, text: str) -> None:
    assert size_text(size) == text
