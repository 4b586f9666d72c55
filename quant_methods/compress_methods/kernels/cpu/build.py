"""Compiling the CPU library, once per machine: on first use, or ahead of time for images.

The file lands in a cache directory (`store.py`) under a name made of everything it depends on:
sources, compiler, flags, torch. Processes that start together wait for one compilation. Where no
compiler is, or it fails or hangs, `BuildError` says so in one line and other kernels do the work.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from compress_methods.kernels.cpu import store
from compress_methods.names import CACHE_VARIABLE, ISA_VARIABLE

SOURCES = Path(__file__).resolve().parent / "src"  # what includes are relative to
PRODUCTS = tuple(
    f"products/{name}.cpp" for name in ("gemm", "integers", "sparse", "tables", "trellis")
)
UNITS = (*PRODUCTS, "operators.cpp")  # compiled side by side
COMPILERS = ("g++", "clang++", "c++")
FLAGS = (
    "-std=c++17",
    "-O3",
    "-ffp-contract=off",
    "-fPIC",
    "-fvisibility=hidden",  # libraries for several instruction sets have the same names
    "-DTORCH_TARGET_VERSION=0x020a000000000000",  # torch 2.10, the first with what is used
)
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (
    *_AVX2,
    *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
    *("-mavx512vbmi", "-mavx512vbmi2", "-mavx512vnni"),
    "-mprefer-vector-width=512",
)
_AVX512_BF16 = (*_AVX512, "-mavx512bf16")
_X86: dict[str, tuple[str, ...]] = {
    "amx": (*_AVX512_BF16, "-mamx-tile", "-mamx-int8", "-mamx-bf16"),
    "avx512_bf16": _AVX512_BF16,
    "avx512_vnni": _AVX512,
    "avx_vnni": (*_AVX2, "-mavxvnni"),
    "avx2": _AVX2,
}
ARM: dict[str, tuple[str, ...]] = {"neon_dot": ("-march=armv8.2-a+dotprod",)}
_OURS = {"x86_64": _X86, "aarch64": ARM}
INSTRUCTION_SETS = {**_OURS.get(platform.machine(), {}), "plain": ()}
# As /proc/cpuinfo calls them.
_NARROW = {"avx2", "fma", "f16c"}
_WIDE = {
    *_NARROW,
    *("avx512f", "avx512bw", "avx512dq", "avx512vl"),
    *("avx512vbmi", "avx512_vbmi2", "avx512_vnni"),
}
_NEEDS = {
    "amx": {*_WIDE, "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16"},
    "avx512_bf16": {*_WIDE, "avx512_bf16"},
    "avx512_vnni": _WIDE,
    "avx_vnni": {*_NARROW, "avx_vnni"},
    "avx2": _NARROW,
    "neon_dot": {"asimddp"},
}
TIMEOUT_SECONDS = 600
VERSION_SECONDS = 20


class BuildError(RuntimeError):
    """There is no library for this machine; the message says why in one line."""


@cache
def _processor() -> frozenset[str]:
    """What the first processor can do; nothing where /proc does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    names = ("flags", "Features")  # on x86, on ARM
    return frozenset(next((line for line in lines if line.startswith(names)), "").split())


def runs_here(isa: str) -> bool:
    """Whether this machine has that instruction set."""
    return _NEEDS.get(isa, set()) <= _processor()


def instruction_set() -> str:
    """`VLLM_COMPRESS_ISA`, or the fastest of `INSTRUCTION_SETS` that this machine has."""
    if chosen := os.environ.get(ISA_VARIABLE):
        there = [isa for isa in INSTRUCTION_SETS if runs_here(isa)]
        if chosen not in there:
            raise BuildError(f"{ISA_VARIABLE} is {chosen!r}, expected one of {', '.join(there)}")
        return chosen
    return next(isa for isa in INSTRUCTION_SETS if runs_here(isa))


def compiler() -> str:
    """`CXX`, or the first C++ compiler there is; raises `BuildError`."""
    wanted = (os.environ["CXX"],) if os.environ.get("CXX") else COMPILERS
    for name in wanted:
        if found := shutil.which(name):
            return found
    raise BuildError(f"no C++ compiler ({' or '.join(wanted)}); install g++ for fast CPU kernels")


@cache
def _version(program: str) -> str:
    return _run([program, "--version"], VERSION_SECONDS).stdout


def _run(command: list[str], seconds: float) -> subprocess.CompletedProcess[str]:
    """A compiler, with all that it starts, for so long; its words may be in any encoding."""
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as problem:
        raise BuildError(f"{command[0]}: {problem.strerror or problem}") from problem
    try:
        out, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired as problem:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise BuildError(f"{command[0]} took over {seconds:g} s") from problem
    return subprocess.CompletedProcess(command, process.returncode, out, errors)


def library_path(isa: str) -> Path:
    """Where the library for `isa` lies or will lie; raises `BuildError` without a compiler."""
    import torch

    digest = hashlib.sha256()
    for source in sorted([*SOURCES.rglob("*.h"), *SOURCES.rglob("*.cpp")]):
        digest.update(str(source.relative_to(SOURCES)).encode() + source.read_bytes())
    facts = (_version(compiler()), torch.__version__, platform.machine(), *_command(isa), *UNITS)
    digest.update("\n".join(facts).encode())
    return store.cache_directory() / f"cpu-{isa}-{digest.hexdigest()[:16]}.so"


def build(isa: str) -> Path:
    """Path of the library for `isa`, compiled now if need be; raises `BuildError`."""
    try:
        path = library_path(isa)
        if store.holds(path):
            return path
        store.own(path.parent)
        with store.locked(path, TIMEOUT_SECONDS):
            if not store.holds(path):
                print(f"vllm-compress: compiling CPU kernels ({isa}), once", file=sys.stderr)
                _compile(isa, path)
    except OSError as problem:
        where = str(problem)
        if not isinstance(problem, store.StoreError):
            where = f"{problem.filename or path.parent}: {problem.strerror or problem}"
        raise BuildError(
            f"{where}; {CACHE_VARIABLE} names another place for compiled kernels"
        ) from problem
    return path


def _compile(isa: str, path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        objects = [Path(folder) / f"{Path(unit).name}.o" for unit in UNITS]
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            units = [
                pool.submit(_make, [*_command(isa), "-c", str(SOURCES / name)], out)
                for name, out in zip(UNITS, objects, strict=True)
            ]
        for unit in units:
            unit.result()
        library = Path(folder) / path.name
        _make([*_command(isa), "-shared", *map(str, objects), *_link()], library)
        store.put(library, path)


def _make(command: list[str], out: Path) -> None:
    """Have the compiler write a file."""
    done = _run([*command, "-o", str(out)], TIMEOUT_SECONDS)
    if done.returncode or not out.is_file():
        errors = [line for line in done.stderr.splitlines() if "error" in line]
        raise BuildError(f"{command[0]} failed: {(errors or ['no message'])[0]}")


def namespace(isa: str) -> str:
    """Of the operators in the library for `isa`."""
    return f"compress_methods_{isa}"


def _command(isa: str) -> list[str]:
    """How a unit is compiled."""
    import torch

    headers = Path(torch.__file__).resolve().parent / "include"
    flags = (*FLAGS, f"-DVC_NAMESPACE={namespace(isa)}", *INSTRUCTION_SETS[isa])
    return [compiler(), *flags, f"-I{SOURCES}", "-isystem", str(headers)]


def _link() -> list[str]:
    """With torch, named so that its thread pool is found."""
    import torch

    return [f"-L{Path(torch.__file__).resolve().parent / 'lib'}", "-ltorch_cpu"]
