"""Damage in recipes of several stages and in searches, of what earlier steps wrote."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from compress_methods import convert
from compress_methods.checkpoint.compressed import INCOMPLETE
from compress_methods.checkpoint.integrity import find_damaged, require_intact
from compress_methods.conversion.driver import Sweep
from compress_methods.errors import OutputError

QUICK = {"algorithm": "gptq", "sweeps": 0}
PACKING = {
    "formats": {"w": {"format": "integer", "bits": 4, "group_size": 128}},
    "modules": [{"match": "blocks", "format": "w", "algorithm": QUICK}],
}
CALIBRATION = {"samples": 2, "length": 32, "held_out": 2}
STAGES = {"stages": [{"transform": "depth", "drop": 2}, PACKING], "calibration": CALIBRATION}
SEARCH = {
    "stages": [{"transform": "width", "ffn": "search"}, PACKING],
    "calibration": CALIBRATION,
    "prune_to": {"perplexity_increase": "1000%", "steps": 3},
}


class Stop(Exception):
    """Stands in for a kill."""


def contents(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in out.iterdir() if p.suffix not in (".md", ".png")}


def without_report(out: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(out).items() if name != "report.json"}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damaged", ["stage", "base", "survey", "block"])
def test_a_damaged_stage_is_made_again(
    damaged: str,
    novels_8m: Path,
    some_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    convert(novels_8m, STAGES, whole, calibration=some_text, quiet=True)
    converted = Sweep._convert

    def stop(self: Sweep, shard: Any) -> Any:
        late = damaged != "survey"
        if shard.block == 3 and (self.journal.directory == out) is late:
            raise Stop
        return converted(self, shard)

    with monkeypatch.context() as patch:
        patch.setattr(Sweep, "_convert", stop)
        with pytest.raises(Stop):
            convert(novels_8m, STAGES, out, calibration=some_text, quiet=True)
    stage = out / ".work" / "stage-1"
    path = {
        "stage": lambda: sorted(stage.glob("block-*.safetensors"))[1],
        "base": lambda: out / ".work" / "base.safetensors",
        "survey": lambda: stage / ".work" / "survey.safetensors",
        "block": lambda: sorted(out.glob("block-*.safetensors"))[1],
    }[damaged]()
    flip(path)
    convert(novels_8m, STAGES, out, calibration=some_text, quiet=True)
    assert without_report(out) == without_report(whole)
    require_intact(out)


@pytest.fixture(scope="module")
def searched(novels_8m: Path, some_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the search makes undisturbed."""
    out = tmp_path_factory.mktemp("searched") / "out"
    convert(novels_8m, SEARCH, out, calibration=some_text, quiet=True)
    return out


@pytest.mark.slow
def test_the_result_of_a_search_is_verified_and_searched_again(
    searched: Path, novels_8m: Path, some_text: Path, tmp_path: Path
) -> None:
    shutil.copytree(searched, tmp_path, dirs_exist_ok=True)
    report = json.loads((tmp_path / "report.json").read_text())
    assert {"curve.png", "README.md", "config.json"} < report["files"].keys()
    require_intact(tmp_path)
    before = without_report(tmp_path)
    again = convert(novels_8m, SEARCH, tmp_path, calibration=some_text, quiet=True)
    assert again == report
    flip(sorted(tmp_path.glob("block-*.safetensors"))[1])
    convert(novels_8m, SEARCH, tmp_path, calibration=some_text, quiet=True)
    assert without_report(tmp_path) == before
    require_intact(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("damage", [False, True])
def test_a_search_stopped_while_its_result_moves_ends_whole(
    damage: bool,
    searched: Path,
    novels_8m: Path,
    some_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    replace, moved = Path.replace, []

    def stop(self: Path, target: Path) -> Path:
        if self.parent.name.startswith("level-") and Path(target).parent == out:
            moved.append(target)
            if len(moved) == 4:
                raise Stop
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stop)
        with pytest.raises(Stop):
            convert(novels_8m, SEARCH, out, calibration=some_text, quiet=True)
    assert (out / INCOMPLETE).exists()
    if damage:
        flip(next(path for path in moved if path.suffix == ".safetensors"))
        with pytest.raises(OutputError, match="the same command makes it again"):
            convert(novels_8m, SEARCH, out, calibration=some_text, quiet=True)
    convert(novels_8m, SEARCH, out, calibration=some_text, quiet=True)
    assert without_report(out) == without_report(searched)
    assert find_damaged(out) == []
