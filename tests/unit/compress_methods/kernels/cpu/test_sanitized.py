"""Our CPU products touch no memory but their own, for every decoder, group size and mode."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from compress_methods.kernels.cpu import build

DRIVER = Path(__file__).parent / "sanitize_cpu_kernels.cpp"
ALL = "address,bounds,float-cast-overflow,shift,signed-integer-overflow"


@pytest.mark.slow
def test_memory_is_only_touched_where_it_should_be(tmp_path: Path) -> None:
    """For this machine's widest instruction set: each takes a minute to compile, and other machines
    have others."""
    program = tmp_path / "sanitized"
    flags = ["-std=c++17", "-O0", f"-fsanitize={ALL}", "-g1", "-fno-sanitize-recover=all"]
    units = [str(build.SOURCES / unit) for unit in build.PRODUCTS]
    sources = [f"-I{build.SOURCES}", str(DRIVER), *units]
    options = [
        *flags,
        *build.INSTRUCTION_SETS[build.instruction_set()],
        *sources,
        "-o",
        str(program),
    ]
    subprocess.run([build.compiler(), *options], check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    counts = dict(zip(*[iter(done.stdout.split())] * 2, strict=True))
    ran = {"products": "5600", "rotated": "4000", "corrected": "4000"}
    ran |= {"look-ups": "200", "paths": "6"}
    assert counts == ran
