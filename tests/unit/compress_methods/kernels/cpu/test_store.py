"""Compiled libraries: nothing is loaded that is cut short or that somebody else could have put
there, and whatever goes wrong is one warning, after which other kernels do the work."""

from __future__ import annotations

import fcntl
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from compress_methods.kernels.cpu import build, store

LOAD = """
import torch, sys
from compress_methods.formats import Stored
from compress_methods.formats.integer import Integer
from compress_methods.kernels import dispatch
from compress_methods.kernels.cpu import build
build.VERSION_SECONDS, build.TIMEOUT_SECONDS = 1, int(sys.argv[1]) if sys.argv[1:] else 300
torch.manual_seed(0)
fmt, weight = Integer(4, 128), torch.randn(32, 256)
matrix = Stored.whole(fmt, fmt.pack(fmt.nearest(weight)), (32, 256))
prepared = dispatch.prepare(matrix)
x = torch.randn(3, 256)
close = torch.allclose(dispatch.matmul(x, prepared), x @ matrix.values().T, atol=0.5, rtol=0.05)
print(prepared.kernel, close)
"""
OURS, OTHERS = "cpu True\n", "torch_int4 True\n"


def load(
    cache: Path | None, *arguments: str, umask: int = 0o022, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A process that multiplies with the best kernel it can get."""
    named = {} if cache is None else {"VLLM_COMPRESS_CACHE": str(cache)}
    without = ("VLLM_COMPRESS_CACHE", "CXX", "XDG_CACHE_HOME")
    clean = {key: value for key, value in os.environ.items() if key not in without}
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", LOAD, *arguments],
        env=clean | named | environment,
        capture_output=True,
        text=True,
        check=False,
        umask=umask,
        timeout=300,
    )


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a library in it."""
    folder = tmp_path_factory.mktemp("compiled") / "new"
    done = load(folder, umask=0o002, CXX=_quick_compiler(folder))
    assert done.stdout == OURS, done.stderr
    return folder


@pytest.fixture
def cache(compiled: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o755)
    for path in compiled.iterdir():
        copy = folder / path.name
        copy.write_bytes(path.read_bytes())
        copy.chmod(stat.S_IMODE(path.stat().st_mode))
    return folder


def library_in(folder: Path) -> Path:
    (path,) = folder.glob("*.so")
    return path


def warned(done: subprocess.CompletedProcess[str], reason: str) -> None:
    """Other kernels did the work, after one line."""
    assert done.returncode == 0, done.stderr
    assert done.stdout == OTHERS
    assert done.stderr.count("no CPU kernels of its own") == 1
    assert reason in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_whole_library_is_loaded_as_it_is(cache: Path, compiled: Path) -> None:
    before = library_in(cache).stat().st_mtime_ns
    done = load(cache, CXX=_quick_compiler(compiled))
    assert done.stdout == OURS
    assert done.stderr == ""
    assert library_in(cache).stat().st_mtime_ns == before
    assert not library_in(cache).stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH)


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "another sum", "no sum"])
def test_a_damaged_library_is_none(tmp_path: Path, damage: str) -> None:
    _, path = planted(tmp_path)
    damaged = {"cut": b"libr", "empty": b"", "flipped": b"Library"}
    path.write_bytes(damaged.get(damage, b"library"))
    if damage == "another sum":
        store._sum_of(path).write_text("0" * 64)
    if damage == "no sum":
        store._sum_of(path).unlink()
    assert not store.holds(path)


@pytest.mark.slow
def test_a_library_cut_short_is_made_again(cache: Path, compiled: Path) -> None:
    """Loading it would end the process by SIGBUS."""
    path = library_in(cache)
    os.truncate(path, path.stat().st_size // 2)
    done = load(cache, CXX=_quick_compiler(compiled))
    assert done.stdout == OURS, done.stderr
    assert done.stderr.count("compiling CPU kernels") == 1
    assert store.holds(path)


@pytest.mark.slow
def test_a_damaged_library_that_cannot_be_made_again_is_left_alone(
    cache: Path, compiled: Path
) -> None:
    path = library_in(cache)
    os.truncate(path, 4096)
    broken = _compiler(compiled, 'echo "error: broken" >&2; exit 1')
    warned(load(cache, CXX=broken), "error: broken")
    assert path.stat().st_size == 4096


def _quick_compiler(folder: Path) -> str:
    """One that has made our library before: whatever it is asked for is a copy."""
    return _compiler(
        folder, f'for out; do :; done; cp {build.build(build.instruction_set())} "$out"'
    )


def _compiler(folder: Path, otherwise: str, version: str = 'exec g++ "$@"') -> str:
    """A compiler of the same version that does something else. Where it lies is part of a library's
    name: what is to find a library is given the compiler beside that."""
    path = folder.parent / "compiler"
    path.write_text(f'#!/bin/sh\ncase "$1" in --version) {version};; *) {otherwise};; esac\n')
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("which", ["folder", "library", "sum"])
@pytest.mark.parametrize("mode", [0o020, 0o002])
def test_what_others_can_write_is_not_loaded(tmp_path: Path, which: str, mode: int) -> None:
    folder, path = planted(tmp_path)
    target = {"folder": folder, "library": path, "sum": store._sum_of(path)}[which]
    assert store.holds(path)
    target.chmod(stat.S_IMODE(target.stat().st_mode) | mode)
    with pytest.raises(store.StoreError, match=rf"{target} can be written by others"):
        store.holds(path)


def test_what_belongs_to_another_user_is_not_loaded(tmp_path: Path) -> None:
    """Root's may be loaded: an image is filled by root and serves as somebody else."""
    fields = list(tmp_path.stat())
    for uid in (0, os.getuid()):
        fields[stat.ST_UID] = uid
        store._check_owner(os.stat_result(fields), tmp_path)
    fields[stat.ST_UID] = os.getuid() + 12345
    with pytest.raises(store.StoreError, match=f"{tmp_path} belongs to user {fields[stat.ST_UID]}"):
        store._check_owner(os.stat_result(fields), tmp_path)


def test_links_are_not_followed(tmp_path: Path) -> None:
    _, path = planted(tmp_path)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        store.holds(path)


def test_a_lock_that_is_a_link_is_refused_and_its_target_kept(tmp_path: Path) -> None:
    _, path = planted(tmp_path)
    precious = tmp_path / "precious"
    precious.write_text("words")
    path.with_suffix(".lock").symlink_to(precious)
    with pytest.raises(OSError, match="symbolic links"), store.locked(path, 1):
        pass
    assert precious.read_text() == "words"


def test_a_lock_keeps_what_is_in_it_and_is_not_waited_for_forever(tmp_path: Path) -> None:
    _, path = planted(tmp_path)
    lock = path.with_suffix(".lock")
    lock.write_text("words")
    with lock.open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        start = time.monotonic()
        with pytest.raises(store.StoreError, match="compiling too long"), store.locked(path, 0.3):
            pass
        assert 0.3 <= time.monotonic() - start < 5
    with store.locked(path, 1):
        assert lock.read_text() == "words"


def test_a_pipe_in_the_place_of_a_library_does_not_hang(tmp_path: Path) -> None:
    _, path = planted(tmp_path)
    path.unlink()
    os.mkfifo(path, 0o600)
    with pytest.raises(store.StoreError, match="is no file"):
        store.holds(path)


def planted(tmp_path: Path) -> tuple[Path, Path]:
    """A folder with a library and its sum, both safe."""
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o755)
    (tmp_path / "made").mkdir()
    made = tmp_path / "made" / "cpu.so"
    made.write_bytes(b"library")
    store.put(made, folder / "cpu.so")
    return folder, folder / "cpu.so"


def test_the_users_own_folder_is_for_that_user_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_COMPRESS_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = store.cache_directory()
    folder.mkdir()
    folder.chmod(0o777)
    store.own(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_named_folder_may_be_read_by_others_and_is_not_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_COMPRESS_CACHE", str(tmp_path / "image"))
    folder, before = store.cache_directory(), os.umask(0)
    try:
        store.own(folder)
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755
    folder.chmod(0o1777)
    with pytest.raises(store.StoreError, match="can be written by others"):
        store.own(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o1777


def test_a_compilers_words_may_be_in_any_encoding(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    odd = r"printf 'error: \351\377 bad' >&2; exit 1"
    version = r"printf 'g++ \351\377'"
    warned(load(folder, CXX=_compiler(folder, odd, version)), "error: \ufffd\ufffd bad")


@pytest.mark.parametrize(("version", "otherwise"), [("sleep 60", "exit 1"), ("echo 1", "sleep 60")])
def test_a_compiler_that_hangs_is_not_waited_for(
    tmp_path: Path, version: str, otherwise: str
) -> None:
    folder, start = tmp_path / "cache", time.monotonic()
    done = load(folder, "2", CXX=_compiler(folder, otherwise, version))
    warned(done, "compiler took over")
    assert time.monotonic() - start < 40


def test_a_compiler_that_is_no_program(tmp_path: Path) -> None:
    path = tmp_path / "compiler"
    path.write_bytes(b"\x00\x01")
    path.chmod(0o755)
    warned(load(tmp_path / "cache", CXX=str(path)), "Exec format error")


def test_a_compiler_that_makes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    warned(load(folder, CXX=_compiler(folder, "exit 0")), "compiler failed: no message")


HOMELESS = """
import os
from unittest import mock
with mock.patch("pwd.getpwuid", side_effect=KeyError):
    from compress_methods.kernels.cpu.library import library
    assert library() is None
"""


def test_a_user_without_a_home_is_told_so() -> None:
    gone = ("HOME", "XDG_CACHE_HOME", "VLLM_COMPRESS_CACHE")
    clean = {key: value for key, value in os.environ.items() if key not in gone}
    command = [sys.executable, "-W", "always", "-c", HOMELESS]
    done = subprocess.run(command, env=clean, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    reason = f"user {os.getuid()} has no home directory; VLLM_COMPRESS_CACHE names another place"
    assert done.stderr.count(reason) == 1


def test_build_kernels_says_an_unknown_instruction_set_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vllm_compress.cli", "build-kernels", "-o", str(tmp_path)]
    environment = os.environ | {"VLLM_COMPRESS_ISA": "mmx"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("vllm-compress: error: VLLM_COMPRESS_ISA is 'mmx', expected one")


@pytest.mark.slow
def test_compilers_here_warn_of_nothing() -> None:
    """Their other versions may, which is no reason for a user to have no kernels. The first set is
    the widest, with most of the code; `arithmetic.compiled` asks the same of others."""
    command = build._command(next(iter(build.INSTRUCTION_SETS)))
    assert "-Werror" not in command
    units = (str(build.SOURCES / unit) for unit in build.UNITS)
    checked = [*command, *units, "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
    done = subprocess.run(checked, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
