"""CPU products on ARM, cross-compiled and emulated: every decoder, group size, dtype and mode gives
what plain C++ gives here."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from compress_methods.kernels.cpu import build
from tests.unit.compress_methods.kernels.cpu.test_sanitized import DRIVER

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
ROUNDED = 2**-8
"""Of the largest result: bfloat16 has eight bits, and sums are taken in another order."""


def compiled(program: Path, compiler: str, *flags: str) -> Path:
    units = [str(build.SOURCES / unit) for unit in build.PRODUCTS]
    options = ["-std=c++17", "-ffp-contract=off", *flags, f"-I{build.SOURCES}", str(DRIVER)]
    subprocess.run([compiler, *options, *units, "-o", str(program)], check=True)
    return program


def results(*command: str | Path) -> list[np.ndarray]:
    """What the driver has kept in the file that is its last argument."""
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
    kept, found, at = Path(command[-1]).read_bytes(), [], 0
    while at < len(kept):
        (count,) = np.frombuffer(kept, np.int64, 1, at)
        found.append(np.frombuffer(kept, np.float32, count, at + 8))
        at += 8 + 4 * int(count)
    return found


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="cross-compiles from x86")
@pytest.mark.skipif(
    not (shutil.which(COMPILER) and shutil.which(EMULATOR)), reason="make tools installs both"
)
def test_emulated_arm_computes_what_plain_code_does(tmp_path: Path) -> None:
    plain = compiled(tmp_path / "plain", build.compiler(), "-O0")
    arm = compiled(tmp_path / "arm", COMPILER, "-O0", "-static", *build.ARM["neon_dot"])
    expected = results(plain, tmp_path / "plain.out")
    found = results(EMULATOR, arm, tmp_path / "arm.out")
    assert len(expected) == len(found) > 5_000
    for a, b in zip(expected, found, strict=True):
        finite = np.isfinite(a)
        assert np.array_equal(finite, np.isfinite(b))
        most = np.abs(a[finite]).max(initial=0)
        assert np.abs(a[finite] - b[finite]).max(initial=0) <= ROUNDED * most
