"""`vllm-compress import` says what was held exactly, and what was not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.unit.compress_methods.checkpoint.interchange.test_import import other_table
from vllm_compress.cli import main

ASSETS = Path(__file__).parents[3] / "assets" / "interchange"


def test_summary_names_exact_and_rounded_matrices(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["import", str(ASSETS / "awq"), "-o", str(tmp_path / "a"), "--quiet"]) == 0
    assert "exact: 7 matrices as int4 g32 asym" in capsys.readouterr().out
    other = ["import", str(other_table(tmp_path / "other")), "-o", str(tmp_path / "b"), "--quiet"]
    assert main(other) == 2
    assert "no format holds its numbers exactly" in capsys.readouterr().err
    assert main([*other, "--inexact", "int8"]) == 0
    assert "rounded: 7 matrices to int8 g32, relative error" in capsys.readouterr().out
    assert main([*other, "--inexact", "int8", "--json"]) == 0  # what is there already
    assert len(json.loads(capsys.readouterr().out)["modules"]) == 7
