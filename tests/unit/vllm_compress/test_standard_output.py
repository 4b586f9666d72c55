"""A full disk behind standard output, and paths that no file system holds, are one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_compress.cli import main

LONG = "x" * 300


@pytest.mark.parametrize("arguments", [["--help"], ["plan", "--help"], ["--version"]])
def test_a_full_disk_behind_standard_output_is_one_line(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "vllm_compress.cli", *arguments]
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, check=False)
    error = done.stderr.decode()
    assert error == "vllm-compress: error: standard output: No space left on device\n"
    assert done.returncode == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ["check", LONG],
        ["check", "MODEL", "--recipe", LONG],
        ["convert", LONG, "--recipe", "int8", "-o", "OUT"],
        ["convert", "MODEL", "--recipe", LONG, "-o", "OUT"],
        ["convert", "MODEL", "--recipe", "int8", "-o", LONG],
        ["convert", "MODEL", "--recipe", "int8", "-o", "OUT", "--calibration", f"{LONG}.txt"],
        ["serve", LONG],
        ["serve", "--config", LONG],
        ["inspect", LONG],
        ["plan", LONG],
        ["teach", "URL", "--style", "cot", "-o", "OUT.jsonl", "--seeds", f"{LONG}.jsonl"],
        ["teach", "URL", "--style", "cot", "-o", f"{LONG}.jsonl", "--seeds", "SEEDS"],
        ["plan", "MODEL", "--recipe", LONG],
    ],
)
@pytest.mark.parametrize("name", [LONG, "a\udcffb", "a\x00b"])
def test_a_path_that_cannot_be_is_one_line(
    name: str,
    arguments: list[str],
    novels_8m: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"MODEL": str(novels_8m), "OUT": str(tmp_path / "out"), LONG: name}
    places[f"{LONG}.txt"] = f"{name}.txt"
    places[f"{LONG}.jsonl"] = f"{name}.jsonl"
    try:
        code = main([places.get(a, a) for a in arguments])
    except SystemExit as left:
        code = left.code
    error = capsys.readouterr().err
    assert code == 2
    assert error.count("\n") == 1, error
    assert error.startswith("vllm-compress: error: ")
    assert not os.path.lexists(tmp_path / "out")
