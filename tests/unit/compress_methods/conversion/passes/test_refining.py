"""Blocks trained after they are packed: better than their start, and resumable inside a block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from compress_methods import convert
from compress_methods.checkpoint.integrity import read_checked
from compress_methods.conversion.passes import refining
from compress_methods.errors import CalibrationError
from tests.robustness.result import TEXT, contents, tiny_model

ITERATIONS = 40
BLOCKS = 3
CALIBRATION = {"samples": 8, "length": 64, "held_out": 2}


def recipe(fmt: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
    algorithm = {"algorithm": "refine", "start": "rtn", "iterations": ITERATIONS, **settings}
    return {
        "formats": {"w": fmt or {"format": "integer", "bits": 2, "group_size": 32}},
        "modules": [{"match": "blocks", "format": "w", "algorithm": algorithm}],
        "calibration": CALIBRATION,
    }


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny") / "model")


def converted(model: Path, recipe: dict[str, Any], out: Path) -> dict[str, Any]:
    return convert(model, recipe, out, calibration=model / TEXT, quiet=True)


@pytest.fixture(scope="module")
def refined(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("refined") / "out"
    return out, converted(tiny, recipe(), out)


def test_every_block_is_nearer_to_the_originals_than_its_start(
    refined: tuple[Path, dict[str, Any]], tiny: Path, tmp_path: Path
) -> None:
    out, report = refined
    assert list(report["refined"]) == [f"model.layers.{index}" for index in range(BLOCKS)]
    for facts in report["refined"].values():
        storable = {at: loss for at, settled, loss in facts["loss"] if settled == 1}
        assert storable[facts["best"]] == min(storable.values()) < 0.95 * storable[0]
        assert facts["iterations"] == ITERATIONS
    plain = recipe()
    plain["modules"][0]["algorithm"] = "rtn"
    start = converted(tiny, plain, tmp_path / "start")
    assert "refined" not in start
    module = report["modules"]["model.layers.0.mlp.up_proj"]
    assert module["algorithm"] == "refine"
    assert "Refined block by block: 3 blocks" in (out / "README.md").read_text()


class Killed(Exception):
    """Ends a conversion as a kill would, at a place of one's choice."""


def test_killed_inside_a_block_it_goes_on_there_to_the_same_bytes(
    refined: tuple[Path, dict[str, Any]],
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step, steps = refining._Training.step, []

    def counted(self: Any, *args: Any) -> None:
        if len(steps) == ITERATIONS + 21:
            steps.append("killed")
            raise Killed
        step(self, *args)
        steps.append(self.part.prefix)

    monkeypatch.setattr(refining._Training, "step", counted)
    monkeypatch.setattr(refining, "SAVE_SECONDS", 0.0)
    out = tmp_path / "out"
    with pytest.raises(Killed):
        converted(tiny, recipe(), out)
    saved = read_checked(out / ".work" / refining.SAVED)
    assert saved is not None
    assert saved["counts"].tolist()[0] == 21
    converted(tiny, recipe(), out)
    # No iteration was done twice.
    assert len(steps) == BLOCKS * ITERATIONS + 1
    assert contents(out) == contents(refined[0])


def test_a_damaged_file_of_the_work_begins_the_block_again(
    refined: tuple[Path, dict[str, Any]],
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    look, calls = refining._Training.look, []

    def counted(self: Any) -> None:
        calls.append(self.iteration)
        if len(calls) == 16:
            raise Killed
        look(self)

    monkeypatch.setattr(refining, "SAVE_SECONDS", 0.0)
    out = tmp_path / "out"
    monkeypatch.setattr(refining._Training, "look", counted)
    with pytest.raises(Killed):
        converted(tiny, recipe(), out)
    monkeypatch.setattr(refining._Training, "look", look)
    path = out / ".work" / refining.SAVED
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    converted(tiny, recipe(), out)
    assert contents(out) == contents(refined[0])


@pytest.mark.parametrize(
    "fmt",
    [
        {"format": "integer", "bits": 2, "group_size": 32, "symmetric": False},
        {"format": "sparse", "n": 2, "m": 4, "values": {"format": "dense"}},
        {"format": "integer", "bits": 2, "group_size": 32, "activations": "int8"},
    ],
    ids=["asymmetric", "2:4", "int8 activations"],
)
def test_other_formats_are_trained_too(fmt: dict[str, Any], tiny: Path, tmp_path: Path) -> None:
    start = "sparsegpt" if fmt["format"] == "sparse" else "rtn"
    report = converted(tiny, recipe(fmt, start=start, precision="bfloat16"), tmp_path / "out")
    found = report["refined"].values()
    gains = [
        min(loss for _, share, loss in f["loss"] if share == 1) / f["loss"][0][2] for f in found
    ]
    assert sum(gains) / len(gains) < 1
    assert (tmp_path / "out" / "report.json").exists()


def test_a_loss_that_is_not_finite_is_said(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refining._Training, "_loss", lambda self, rows: torch.tensor(float("nan")))
    with pytest.raises(
        CalibrationError, match=r"model\.layers\.0: refining it gives a loss of nan"
    ):
        converted(tiny, recipe(), tmp_path / "out")
