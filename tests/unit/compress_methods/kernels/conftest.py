"""Fixtures of the tests of kernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from compress_methods.kernels.cpu import build
from compress_methods.kernels.cpu.library import Library
from tests.unit.compress_methods.kernels.arithmetic import WIDTHS, compiled, using


@pytest.fixture(
    scope="module",
    params=[isa for isa in build.INSTRUCTION_SETS if isa in WIDTHS and build.runs_here(isa)],
)
def isa(request: pytest.FixtureRequest) -> Iterator[Library]:
    """Our own library, one after the other, does the work."""
    with using(compiled(request.param)) as loaded:
        yield loaded
