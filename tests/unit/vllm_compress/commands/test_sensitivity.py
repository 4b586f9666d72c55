"""`sensitivity` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_compress.cli import main

RECIPE = """
formats:
  w2: {format: integer, bits: 2, group_size: 128}
  w4: {format: integer, bits: 4, group_size: 128}
  s: {format: sparse, n: 64, m: 128, values: {format: integer, bits: 4, group_size: 32}}
modules: [{match: blocks, format: [w2, w4]}]
budget: {bits: 3}
calibration: {samples: 4, length: 64}
"""


@pytest.fixture
def asked(novels_8m: Path, some_text: Path, tmp_path: Path) -> list[str]:
    (tmp_path / "mine.yaml").write_text(RECIPE)
    options = ["--recipe", str(tmp_path / "mine.yaml"), "--calibration", str(some_text), "--quiet"]
    return ["sensitivity", str(novels_8m), *options]


def test_json_has_every_group_and_format_and_fewer_bits_lose_more(
    asked: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "layers.png"
    assert main([*asked, "--json", "--picture", str(picture)]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert [(row["layer"], row["group"]) for row in found["groups"]][:4] == [
        (0, "self_attn.q_proj+k_proj+v_proj"),
        (0, "self_attn.o_proj"),
        (0, "mlp.gate_proj+up_proj"),
        (0, "mlp.down_proj"),
    ]
    assert len(found["groups"]) == 32
    for row in found["groups"]:
        two, four = row["formats"]["w2"], row["formats"]["w4"]
        assert two["bytes"] < four["bytes"]
        assert two["kl"] > four["kl"] > 0
        assert two["drift"] > four["drift"] > 0
        assert four["bits_per_weight"] == pytest.approx(4.125)
    sums = found["totals"]["w4"]
    assert sums["kl"] == pytest.approx(sum(row["formats"]["w4"]["kl"] for row in found["groups"]))
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_recipe_of_one_format_is_measured_in_any_of_its_formats(
    asked: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*asked, "--formats", "w4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["layer", "group", "weights", "w4"]
    assert lines[1].split()[:2] == ["0", "self_attn.q_proj+k_proj+v_proj"]
    assert any(line.split()[:3] == ["sum", "of", "KL"] for line in lines)


def test_what_was_measured_is_kept_where_the_user_says(
    asked: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from compress_methods.conversion.passes.allocation import AllocatedPacking

    work = ["--work", str(tmp_path / "work"), "--json"]
    assert main([*asked, *work]) == 0
    first = capsys.readouterr().out
    monkeypatch.delattr(AllocatedPacking, "survey")
    assert main([*asked, *work]) == 0
    assert capsys.readouterr().out == first


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--formats", "w5"], "has no format 'w5'; valid: s, w2, w4"),
        (["--recipe", "depth25"], "has stages; give one that only packs"),
        (["--calibration", "gone.txt"], "gone.txt: no such file"),
        (["--picture", "/nowhere/a.png"], "/nowhere/a.png: no such directory to write it to"),
    ],
)
def test_a_mistake_is_one_line(
    asked: list[str], options: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*asked, *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
