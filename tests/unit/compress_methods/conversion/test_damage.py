"""Damaged files of a result, finished or not, are seen, and made again by the same command."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from compress_methods import convert
from compress_methods.checkpoint.compressed import INCOMPLETE
from compress_methods.checkpoint.integrity import (
    find_damaged,
    read_checked,
    read_report,
    require_intact,
    write_checked,
)
from compress_methods.conversion.driver import Sweep
from compress_methods.errors import CheckpointError
from tests.robustness.result import contents

QUICK = {"algorithm": "gptq", "sweeps": 0}
PLAIN = {
    "formats": {"w": {"format": "integer", "bits": 4, "group_size": 128}},
    "modules": [{"match": "blocks", "format": "w", "algorithm": "rtn"}],
    "calibration": {"samples": 2, "length": 32, "held_out": 1},
}
CALIBRATED = {**PLAIN, "modules": [{"match": "blocks", "format": "w", "algorithm": QUICK}]}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGE: dict[str, Callable[[Path], None]] = {"flip": flip, "cut": cut, "delete": Path.unlink}


@pytest.fixture
def visited(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the shards that are converted."""
    names: list[str] = []
    converted = Sweep._convert

    def record(self: Sweep, shard: Any) -> Mapping[str, Any]:
        names.append(shard.name)
        return converted(self, shard)

    monkeypatch.setattr(Sweep, "_convert", record)
    return names


def test_the_report_holds_the_checksum_of_every_file(novels_8m: Path, tmp_path: Path) -> None:
    report = convert(novels_8m, PLAIN, tmp_path, quiet=True)
    names = {path.name for path in tmp_path.iterdir()} - {"report.json"}
    assert {"tokenizer.json", "config.json", "README.md"} < names
    expected = {n: hashlib.sha256((tmp_path / n).read_bytes()).hexdigest() for n in names}
    assert report["files"] == expected
    assert read_report(tmp_path) == report
    require_intact(tmp_path)


@pytest.mark.parametrize("kind", DAMAGE)
def test_without_text_only_what_is_damaged_is_made_again(
    kind: str, novels_8m: Path, tmp_path: Path, visited: list[str]
) -> None:
    convert(novels_8m, PLAIN, tmp_path, quiet=True)
    before, shards = contents(tmp_path), list(visited)
    shard = sorted(tmp_path.glob("*.safetensors"))[2]
    for name in sorted(before):
        visited.clear()
        DAMAGE[kind](tmp_path / name)
        assert find_damaged(tmp_path) == [name]
        with pytest.raises(CheckpointError, match=name):
            require_intact(tmp_path)
        convert(novels_8m, PLAIN, tmp_path, quiet=True)
        assert contents(tmp_path) == before
        require_intact(tmp_path)
        assert len(visited) == (1 if name.endswith(".safetensors") else 0), name
        assert not (tmp_path / INCOMPLETE).exists()
    assert len(shards) > 3
    assert shard.name in before


def test_a_changed_number_of_the_report_is_not_believed(novels_8m: Path, tmp_path: Path) -> None:
    convert(novels_8m, PLAIN, tmp_path, quiet=True)
    path = tmp_path / "report.json"
    block = json.loads(path.read_text())
    path.write_text(json.dumps({**block, "bytes_after": block["bytes_after"] + 1}))
    assert find_damaged(tmp_path) == ["report.json"]
    with pytest.raises(CheckpointError, match="own checksum"):
        require_intact(tmp_path)
    assert convert(novels_8m, PLAIN, tmp_path, quiet=True)["bytes_after"] == block["bytes_after"]


def test_swapped_shards_and_one_of_another_model_are_seen(novels_8m: Path, tmp_path: Path) -> None:
    convert(novels_8m, PLAIN, tmp_path, quiet=True)
    one, two = sorted(tmp_path.glob("block-*.safetensors"))[:2]
    data = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(data)
    assert find_damaged(tmp_path) == [one.name, two.name]


def test_a_calibrated_result_is_made_again(
    novels_8m: Path, some_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(novels_8m, CALIBRATED, tmp_path, calibration=some_text, quiet=True)
    before = contents(tmp_path)
    flip(sorted(tmp_path.glob("block-*.safetensors"))[3])
    convert(novels_8m, CALIBRATED, tmp_path, calibration=some_text)
    assert contents(tmp_path) == before
    assert "block-00003.safetensors: damaged or missing; converting" in capsys.readouterr().err


class Stop(Exception):
    """Stands in for a kill."""


@pytest.mark.parametrize("damaged", ["block", "activations", "no activations"])
def test_a_finished_unit_that_is_damaged_meanwhile_is_converted_again(
    damaged: str,
    novels_8m: Path,
    some_text: Path,
    tmp_path: Path,
    visited: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    convert(novels_8m, CALIBRATED, whole, calibration=some_text, quiet=True)
    converted = Sweep._convert
    with monkeypatch.context() as patch:

        def stop(self: Sweep, shard: Any) -> Any:
            if shard.block == 3:
                raise Stop
            return converted(self, shard)

        patch.setattr(Sweep, "_convert", stop)
        with pytest.raises(Stop):
            convert(novels_8m, CALIBRATED, out, calibration=some_text, quiet=True)
    states = max((out / ".work").glob("activations-*.safetensors"))
    if damaged == "block":
        flip(sorted(out.glob("block-*.safetensors"))[1])
    elif damaged == "activations":
        flip(states)
    else:
        states.unlink()
    visited.clear()
    convert(novels_8m, CALIBRATED, out, calibration=some_text, quiet=True)
    assert contents(out) == contents(whole)
    assert "block-00000" in " ".join(visited)


def test_any_flipped_bit_of_work_in_progress_is_seen(tmp_path: Path) -> None:
    import torch

    path = tmp_path / "states.safetensors"
    tensors = {"a": torch.randn(3, 5), "b": torch.tensor(2.5, dtype=torch.bfloat16)}
    write_checked(path, tensors)
    found = read_checked(path)
    assert found is not None
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    whole, moments = path.read_bytes(), random.Random(0)
    start = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(300):
        data = bytearray(whole)
        data[moments.randrange(start, len(data))] ^= 1 << moments.randrange(8)
        path.write_bytes(data)
        assert read_checked(path) is None
