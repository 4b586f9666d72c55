"""A read that fails names the file that was read, not the one that was being written."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from compress_methods import convert
from compress_methods.checkpoint.safetensors import read_header
from compress_methods.errors import CheckpointError, OutputError
from compress_methods.system import memory

RECIPE = {
    "formats": {"w": {"format": "integer", "bits": 8, "group_size": 128}},
    "modules": [{"match": "re:.*o_proj", "format": "w"}],
}


def fail(*_: Any) -> int:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_bad_sector_of_the_source_is_the_sources(
    novels_8m: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(CheckpointError, match=r"novels-8m/.*safetensors: not readable at byte"):
        convert(novels_8m, RECIPE, tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError, match="not readable"):
        read_header(tmp_path)  # a directory in a file's place


def test_a_file_that_cannot_be_copied_is_named(
    novels_8m: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Path.open

    def refuse(self: Path, *args: Any, **options: Any) -> Any:
        if self.name == "tokenizer.json" and self.parent.name == "model" and args == ("rb",):
            refuse.count += 1  # type: ignore[attr-defined]
            if refuse.count > 1:  # type: ignore[attr-defined]
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(self))
        return opened(self, *args, **options)

    refuse.count = 0  # type: ignore[attr-defined]
    shutil.copytree(novels_8m, tmp_path / "model")
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(OutputError, match=r"model/tokenizer.json: Input/output error"):
        convert(tmp_path / "model", RECIPE, tmp_path / "out", quiet=True)


def test_a_library_call_leaves_its_hosts_memory_settings(
    novels_8m: Path, some_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Library:
        def mallopt(self, *_: int) -> None:
            raise AssertionError("mallopt in someone else's process")

    monkeypatch.setattr(memory.ctypes, "CDLL", lambda _: Library())
    calibration = {"samples": 1, "length": 8, "held_out": 1}
    recipe = {**RECIPE, "calibration": calibration}
    convert(novels_8m, recipe, tmp_path / "out", calibration=some_text, quiet=True)
