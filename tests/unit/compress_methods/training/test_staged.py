"""Recipes that train: segments in order, one result that speaks of all of them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from compress_methods import convert
from compress_methods.checkpoint.compressed import open_compressed, read_entries
from compress_methods.checkpoint.integrity import find_damaged
from compress_methods.checkpoint.interchange import Layout
from compress_methods.conversion.running import Running
from compress_methods.errors import RecipeError
from compress_methods.recipe.stages import load_staged
from compress_methods.recipe.training import Training, parse_training
from compress_methods.training import staged
from compress_methods.training.staged import Trained
from tests.unit.compress_methods.training.killed import Killed

DEPTH = {"transform": "depth", "drop": 2}
QUICK = {"steps": 3, "batch": 2, "sequences": 8, "held_out": 2, "length": 32}
HEAL = {"train": "distill", "loss": "reverse_kl", **QUICK}
SCALES = {"train": "scales", **QUICK}
PACKING = {
    "formats": {"w": {"format": "integer", "bits": 4, "group_size": 128}},
    "modules": [{"match": "blocks", "format": "w"}],
}
SMALL = {"samples": 4, "length": 32, "held_out": 2}


def chain(*stages: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"stages": list(stages), "calibration": SMALL, **more}


def report_of(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "report.json").read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def healed(novels_8m: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("healed") / "out"
    convert(novels_8m, chain(DEPTH, HEAL, PACKING, SCALES), out, quiet=True)
    return out


def test_segments_are_the_stages_in_order() -> None:
    recipe = load_staged(chain(DEPTH, DEPTH, HEAL, PACKING, SCALES, SCALES))
    found = [
        one.train if isinstance(one, Training) else (len(one.transforms), one.packing is not None)
        for one in recipe.segments
    ]
    assert found == [(2, False), "distill", (0, True), "scales", "scales"]
    written = recipe.to_dict()["stages"]
    assert [next(iter(stage)) for stage in written] == [
        *["transform"] * 2,
        "train",
        "formats",
        *["train"] * 2,
    ]
    again = [parse_training(written[i], "again") for i in (2, 4, 5)]
    assert [one.to_dict() for one in again] == [one.to_dict() for _, one in recipe.training]


def test_training_is_part_of_what_a_recipe_means() -> None:
    plain, trained = load_staged(chain(DEPTH)), load_staged(chain(DEPTH, HEAL))
    longer = load_staged(chain(DEPTH, {**HEAL, "steps": 4}))
    assert len({one.sha256 for one in (plain, trained, longer)}) == 3


def test_one_report_speaks_of_all_segments(healed: Path, novels_8m: Path) -> None:
    report = report_of(healed)
    assert [stage["stage"] for stage in report["stages"]] == [
        "depth",
        "train distill",
        "packing",
        "train scales",
    ]
    assert [training["loss"] for training in report["training"]] == ["reverse_kl", "kl"]
    assert report["base_model"] == novels_8m.name
    assert {name.split(".")[2] for name in report["dropped"]} != set()
    assert report["bytes_before"] == sum(e.nbytes for e in read_entries(novels_8m).values())
    assert report["bytes_after"] == sum(e.nbytes for e in read_entries(healed).values())
    checkpoint = open_compressed(healed)
    assert len(checkpoint.matrices) == 6 * 7
    assert report["held_out"] == report["training"][-1]["held_out"]
    assert not find_damaged(healed)
    assert not (healed / ".work").exists()


def test_a_packing_that_ends_is_held_against_the_original(
    novels_8m: Path, some_text: Path, tmp_path: Path
) -> None:
    recipe = chain(DEPTH, HEAL, PACKING)
    report = convert(novels_8m, recipe, tmp_path / "out", calibration=some_text, quiet=True)
    *_, packed = report["stages"]
    assert report["held_out"]["kl"] > 2 * packed["held_out"]["kl"]
    assert report["training"][0]["train"] == "distill"


def test_a_killed_recipe_goes_on_with_the_segment_it_was_at(
    healed: Path, novels_8m: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[int] = []
    original = Trained._segment

    def segment(self: Trained, journal: Any, number: int) -> None:
        if number == 2 and 2 not in done:
            done.append(number)
            raise Killed
        if self._name(number) not in journal.finished:
            done.append(number)
        original(self, journal, number)

    monkeypatch.setattr(staged.Trained, "_segment", segment)
    recipe, out = chain(DEPTH, HEAL, PACKING, SCALES), tmp_path / "out"
    with pytest.raises(Killed):
        convert(novels_8m, recipe, out, quiet=True)
    convert(novels_8m, recipe, out, quiet=True)
    assert done == [0, 1, 2, 2, 3]
    expected, found = read_entries(healed), read_entries(out)
    assert all(torch.equal(expected[name].read(), found[name].read()) for name in expected)


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (chain(HEAL, PACKING), "the original itself has nothing to win back"),
        (chain(PACKING), "stages has only the packing"),
        (chain(PACKING, DEPTH), "nothing can follow the packing but training"),
        (
            {"stages": [DEPTH, HEAL], "accept": {"kl": 1.0}},
            "accept cannot judge recipes that train",
        ),
        (
            chain({**DEPTH, "drop": "search"}, HEAL, prune_to={"size": 0.9}),
            "prune_to cannot search recipes that train",
        ),
    ],
)
def test_what_training_cannot_be_part_of_is_refused(recipe: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        load_staged(recipe)


def test_other_layouts_are_refused(novels_8m: Path, tmp_path: Path) -> None:
    recipe, layout = load_staged(chain(PACKING, SCALES)), cast(Layout, SimpleNamespace(name="x"))
    running = Running(torch.device("cpu"), torch.float32, True)
    with pytest.raises(RecipeError, match="cannot train the layout 'x'"):
        Trained(recipe, tmp_path / "out", None, (novels_8m, False, 1), layout, running)


def test_files_of_a_stage_lie_beside_the_recipe(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps(chain(DEPTH, {**HEAL, "data": "text.txt"})), encoding="utf-8")
    ((_, training),) = load_staged(path).training
    assert training.data == str(tmp_path / "text.txt")
    assert load_staged(path).to_dict()["stages"][1]["data"] == "text.txt"
