"""Compiling our CPU kernels: once, ahead of time, and what is said where nothing compiles."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from compress_methods.kernels.cpu import build


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )


CHOOSE = """
import torch
from compress_methods.formats import Stored
from compress_methods.formats.integer import MID, WHOLE, Integer
from compress_methods.kernels import choose
fmt = Integer(4, 128)
print(choose(Stored.whole(fmt, fmt.pack(fmt.nearest(torch.ones(64, 256))), (64, 256))).name)
"""


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("no-such-compiler", "no C++ compiler (no-such-compiler); install g++"),
        ("false", "/false failed: no message"),
    ],
)
def test_without_a_compiler_torch_does_the_work(compiler: str, reason: str, tmp_path: Path) -> None:
    done = run_python(CHOOSE, CXX=compiler, VLLM_COMPRESS_CACHE=str(tmp_path))
    assert done.stdout == "torch_int4\n"
    assert done.stderr.count("no CPU kernels of its own") == 1
    assert reason in done.stderr
    assert not list(tmp_path.glob("*.so"))


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = run_python(CHOOSE, VLLM_COMPRESS_CACHE=str(tmp_path / "file"))
    assert done.stdout == "torch_int4\n"
    assert f"{tmp_path / 'file'}: File exists; VLLM_COMPRESS_CACHE names another" in done.stderr


@pytest.mark.slow
def test_kernels_are_built_ahead_of_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = tmp_path / "g++"  # what is loaded here has been compiled before, nothing else is
    isa = build.instruction_set()
    made, ours = build.build(isa), build.namespace(isa)
    quick.write_text(
        f'#!/bin/sh\nfor out; do :; done\ncase "$*" in --version) exec {build.compiler()} "$@";; '
        f'*VC_NAMESPACE={ours}\\ *) cp {made} "$out";; *) : > "$out";; esac\n'
    )
    quick.chmod(0o755)
    monkeypatch.setenv("CXX", str(quick))
    command = [sys.executable, "-m", "vllm_compress.cli", "build-kernels"]
    options = ["--all", "-o", str(tmp_path)]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
    assert [Path(line).is_file() for line in done.stdout.split()] == [True] * len(
        build.INSTRUCTION_SETS
    )
    code = "from compress_methods.kernels.cpu.library import library; print(library().isa)"
    found = run_python(code, VLLM_COMPRESS_CACHE=str(tmp_path), PATH=os.environ["PATH"])
    assert found.stdout.strip() == build.instruction_set()
    assert found.stderr == ""
    failed = subprocess.run(
        [*command, *options], capture_output=True, text=True, env=os.environ | {"CXX": "none"}
    )
    assert failed.returncode == 2
    assert failed.stderr.startswith("vllm-compress: error: no C++ compiler (none)")


@pytest.mark.slow
def test_two_processes_compile_once(tmp_path: Path) -> None:
    counter = tmp_path / "g++"
    counter.write_text(
        f'#!/bin/sh\nfor out; do :; done\ncase "$1" in --version) echo 1;; '
        f'*) echo x >> {tmp_path}/calls; sleep 1; : > "$out";; esac\n'
    )
    counter.chmod(0o755)
    code = "from compress_methods.kernels.cpu.build import build; print(build('plain'))"
    environment = os.environ | {"CXX": str(counter), "VLLM_COMPRESS_CACHE": str(tmp_path / "new")}
    both = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    paths = {process.communicate(timeout=120)[0] for process in both}
    assert len(paths) == 1
    assert (tmp_path / "calls").read_text() == "x\n" * (len(build.UNITS) + 1)  # and linked
    assert Path(paths.pop().decode().strip()).is_file()


def test_the_name_depends_on_what_went_in(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {build.library_path(isa) for isa in build.INSTRUCTION_SETS}
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert len(before | {build.library_path(isa) for isa in build.INSTRUCTION_SETS}) == 2 * len(
        before
    )
