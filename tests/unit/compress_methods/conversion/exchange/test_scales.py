"""Scales of several tasks beside one set of codes: what is written, read, and refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from compress_methods import convert
from compress_methods.checkpoint.compressed import read_entries
from compress_methods.conversion.exchange.scales import FACTS, VALUES, read_scales, split_scales
from compress_methods.errors import CheckpointError, OutputError
from compress_methods.training.recover import write_changed
from vllm_compress.cli import main

RECIPE = {
    "formats": {"w": {"format": "integer", "bits": 4, "group_size": 128}},
    "modules": [{"match": "blocks", "format": "w"}],
    "calibration": {"held_out": 0},
}
SCALES = "model.layers.3.mlp.up_proj.weight_scales"
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def base(novels_8m: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("base") / "int4"
    convert(novels_8m, RECIPE, out, quiet=True)
    return out


def trained(base: Path, place: Path, *names: str) -> Path:
    """The base with other values of some tensors."""
    entries = read_entries(base)
    place.mkdir()
    changed = {name: (entries[name].read() * 2).to(entries[name].read().dtype) for name in names}
    write_changed(base, place, changed)
    return place


def test_only_what_differs_is_written(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, out = trained(base, tmp_path / "trained", SCALES, NORM), tmp_path / "task"
    assert main(["split-scales", str(other), "--base", str(base), "-o", str(out)]) == 0
    assert "2 tensors" in capsys.readouterr().out
    found, held = read_scales(out, base), read_entries(other)
    assert found.keys() == {SCALES, NORM}
    assert all(torch.equal(found[name], held[name].read()) for name in found)
    assert (out / VALUES).stat().st_size < 2 * sum(held[name].nbytes for name in found)


def test_codes_have_to_be_the_bases(base: Path, tmp_path: Path) -> None:
    name = next(name for name, entry in read_entries(base).items() if "int" in entry.dtype)
    with pytest.raises(CheckpointError, match=f"{name} differs .* and holds codes"):
        split_scales(trained(base, tmp_path / "trained", name), base, tmp_path / "task")
    assert not (tmp_path / "task").exists()


def test_what_is_no_set_is_refused(base: Path, novels_8m: Path, tmp_path: Path) -> None:
    out = tmp_path / "task"
    with pytest.raises(CheckpointError, match="nothing in it differs"):
        split_scales(base, base, out)
    with pytest.raises(CheckpointError, match="expected the same"):
        split_scales(novels_8m, base, out)
    other = trained(base, tmp_path / "trained", SCALES)
    with pytest.raises(OutputError, match="exists already"):
        split_scales(other, base, tmp_path)
    with pytest.raises(CheckpointError, match=f"holds no {FACTS}"):
        read_scales(tmp_path, base)
    split_scales(other, base, out)
    facts = json.loads((out / FACTS).read_text())
    (out / FACTS).write_text(json.dumps({**facts, "base": "0"}))
    with pytest.raises(CheckpointError, match="belongs to another int4"):
        read_scales(out, base)
