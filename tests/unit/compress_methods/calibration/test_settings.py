"""How much calibration text, and whose, is what the recipe and the command line say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from compress_methods.calibration.settings import CalibrationSettings, TextFile
from compress_methods.conversion.planning.calibration import settings_of, widest_columns
from compress_methods.conversion.stages import Stage, open_stages
from compress_methods.errors import CalibrationError, RecipeError
from compress_methods.recipe.matching import recipe_names
from compress_methods.recipe.stages import load_staged
from compress_methods.system.resources import config_path

W4 = {"format": "integer", "bits": 4, "group_size": 128}
GPTQ = {"match": "blocks", "format": "w", "algorithm": "gptq"}


def recipe(calibration: Any, rule: dict[str, Any] = GPTQ) -> dict[str, Any]:
    return {"formats": {"w": W4}, "modules": [rule], "calibration": calibration}


def planned(model: Path, calibration: Any, rule: dict[str, Any] = GPTQ) -> list[Stage]:
    return open_stages(model, load_staged(recipe(calibration, rule)))


@pytest.mark.parametrize(
    ("calibration", "algorithm", "samples"),
    [
        ({"length": 512}, "gptq", 64),
        ({"length": 32}, "gptq", 192),  # 8 x 768 columns
        ({"length": 90}, "gptq", 69),
        ({"length": 32, "samples": "auto"}, "gptq", 192),
        ({"length": 32, "samples": 3}, "gptq", 3),
        ({"length": 32}, "rtn", 64),
    ],
)
def test_samples_fit_the_widest_calibrated_matrix(
    calibration: Any, algorithm: str, samples: int, novels_8m: Path
) -> None:
    stages = planned(novels_8m, calibration, {**GPTQ, "algorithm": algorithm})
    assert settings_of(stages).samples == samples
    assert not settings_of(stages).auto


def test_a_pass_that_gathers_inputs_counts_and_all_stages_agree(novels_8m: Path) -> None:
    block = {
        "stages": [{"transform": "width", "ffn": "50%"}, {"formats": {"w": W4}, "modules": [GPTQ]}],
        "calibration": {"length": 32},
    }
    stages = open_stages(novels_8m, load_staged(block))
    assert len(stages) == 2
    assert widest_columns(stages[1:]) < widest_columns(stages) == 768
    assert {stage.planned.plan.recipe.calibration.samples for stage in stages} == {192}


def test_shipped_recipes_leave_it_open_and_mean_what_they_meant(novels_8m: Path) -> None:
    for name in recipe_names():
        block = yaml.safe_load(config_path("recipes", f"{name}.yaml").read_text())
        if "calibration" not in block or name == "experts25":  # which is for mixtures
            continue
        assert "samples" not in block["calibration"], name
        settled = open_stages(novels_8m, load_staged(name))[-1].planned.plan.recipe
        block["calibration"]["samples"] = 64
        stated = open_stages(novels_8m, load_staged({**block}))[-1].planned.plan.recipe
        assert settled.sha256 == stated.sha256, name


def test_files_lie_beside_the_recipe_and_are_known_by_name(tmp_path: Path) -> None:
    path = tmp_path / "here" / "mine.yaml"
    path.parent.mkdir()
    files = [{"path": "texts/chats.jsonl", "weight": 2}, "code.txt", str(tmp_path / "far.txt")]
    path.write_text(yaml.safe_dump(recipe({"files": files})))
    staged = load_staged(path)
    assert [file.path for file in staged.calibration.files] == [
        path.parent / "texts" / "chats.jsonl",
        path.parent / "code.txt",
        tmp_path / "far.txt",
    ]
    assert [file.weight for file in staged.calibration.files] == [2, 1, 1]
    assert staged.packing is not None
    assert staged.packing.calibration == staged.calibration
    assert str(tmp_path) not in str(staged.to_dict())
    assert staged.to_dict()["calibration"]["files"][0] == {"path": "chats.jsonl", "weight": 2.0}
    assert load_staged(recipe({"files": ["a.txt"]})).calibration.files == (TextFile(Path("a.txt")),)


def test_a_search_keeps_the_place_of_its_files(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    block = {
        "stages": [{"transform": "depth", "drop": "search"}],
        "prune_to": {"size": "60%"},
        "calibration": {"files": ["a.txt"]},
    }
    path.write_text(yaml.safe_dump(block))
    staged = load_staged(path)
    assert staged.at(0.5).calibration.files == (TextFile(tmp_path / "a.txt"),)
    assert str(tmp_path) not in str(staged.to_dict())


def test_weights_and_presets_are_of_a_recipes_meaning() -> None:
    def sha(**calibration: Any) -> str:
        return load_staged(recipe(calibration)).sha256

    one, two = {"path": "a.txt", "weight": 1}, {"path": "a.txt", "weight": 2}
    assert sha(files=["a.txt", "b.txt"]) == sha(files=[one, "b.txt"])
    kinds = [
        sha(),
        sha(files=["a.txt", "b.txt"]),
        sha(files=[two, "b.txt"]),
        sha(source="self", preset="code"),
        sha(preset="chat"),
    ]
    assert len(set(kinds)) == len(kinds)
    assert sha(source="self", preset="code") == sha(preset="code")


@pytest.mark.parametrize(
    ("calibration", "words"),
    [
        ({"samples": "many"}, "calibration: samples is 'many', expected a number or auto"),
        ({"samples": 0}, "calibration: samples is 0, expected an integer from 1"),
        ({"auto": True}, "calibration: unknown key 'auto'"),
        ({"files": "a.txt"}, r"files is 'a.txt', expected a list such as"),
        ({"files": []}, r"files is \[\], expected a list"),
        ({"files": [3]}, r"files\[0\] is 3, expected a path"),
        ({"files": [{"weight": 2}]}, r"files\[0\] is .* expected a path"),
        ({"files": [""]}, r"files\[0\]: path is empty"),
        ({"files": [{"path": "a.txt", "wieght": 2}]}, r"files\[0\]: unknown key 'wieght'"),
        ({"files": [{"path": "a.txt", "weight": 0}]}, r"files\[0\]: weight is 0, expected"),
        ({"files": [{"path": "a.txt", "weight": "2"}]}, r"files\[0\]: weight is '2', expected"),
        ({"files": [{"path": "a.txt", "weight": float("nan")}]}, "weight is nan, expected"),
        ({"source": "chats.jsonl"}, "source is 'chats.jsonl', expected self; .* into files"),
        ({"preset": "cod"}, "unknown preset 'cod'; did you mean 'code'"),
        ({"preset": ""}, "preset is '', expected plain, chat, code, long"),
        ({"preset": "code", "files": ["a.txt"]}, "files and preset 'code' are both given"),
    ],
)
def test_what_cannot_be_meant_is_one_line(calibration: Any, words: str) -> None:
    with pytest.raises(RecipeError, match=words) as caught:
        load_staged(recipe(calibration))
    assert "\n" not in str(caught.value)


def test_the_command_line_wins_over_the_recipe() -> None:
    settings = CalibrationSettings(files=(TextFile(Path("a.txt"), 3),))
    assert settings.asked(None) == settings.asked([]) == settings
    assert settings.asked("b.txt").files == (TextFile(Path("b.txt")),)
    assert settings.asked(["b.txt", "c.txt"]).files[1] == TextFile(Path("c.txt"))
    found = settings.asked(["self:code"])
    assert (found.files, found.preset) == ((), "code")
    assert settings.asked("self").preset == "plain"
    assert found.asked(Path("b.txt")).preset == ""
    with pytest.raises(CalibrationError, match="unknown preset 'chta'; did you mean 'chat'"):
        settings.asked("self:chta")
    with pytest.raises(CalibrationError, match="'self:chat' cannot be mixed"):
        settings.asked(["a.txt", "self:chat"])
