"""What a training is said to take before it starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from compress_methods.checkpoint.loading.tied import open_skeleton
from compress_methods.conversion.stages import open_stages
from compress_methods.errors import RecipeError
from compress_methods.model.skeleton import Skeleton
from compress_methods.recipe.stages import load_staged
from compress_methods.recipe.training import Training
from compress_methods.training import cost
from compress_methods.training.cost import Planned, planned_of, require_memory, values_of
from compress_methods.training.student import Student

SIZE: dict[str, Any] = {"steps": 100, "batch": 8, "sequences": 64, "held_out": 8, "length": 128}


@pytest.fixture(scope="module")
def skeleton(novels_8m: Path) -> Skeleton:
    return open_skeleton(novels_8m)


def planned(skeleton: Skeleton, train: str = "distill", **more: Any) -> Planned:
    return Planned(Training(train, **{**SIZE, **more}), skeleton, skeleton)


def test_every_training_of_a_recipe_is_counted_on_its_own_student(novels_8m: Path) -> None:
    small = {"steps": 2, "batch": 2, "sequences": 4, "held_out": 1, "length": 32}
    integer = {"format": "integer", "bits": 4, "group_size": 128}
    stages = [
        {"transform": "depth", "keep": [0, 7]},
        {"train": "distill", **small},
        {"formats": {"w": integer}, "modules": [{"match": "blocks", "format": "w"}]},
        {"train": "scales", **small},
        {"train": "qat", **small},
    ]
    recipe = load_staged({"stages": stages})
    found = list(planned_of(recipe, open_stages(novels_8m, recipe)))
    matrices = 2 * (256 * 256 + 2 * 128 * 256 + 256 * 256 + 3 * 768 * 256)
    everything = matrices + 2 * 4096 * 256 + 5 * 256
    assert [one.training.train for one in found] == ["distill", "scales", "qat"]
    assert [one.moved for one in found] == [everything, matrices // 128, matrices * 129 // 128]


def test_it_counts_what_a_student_moves(skeleton: Skeleton, novels_8m: Path) -> None:
    import torch

    for rank in (0, 4):
        student = Student(novels_8m, "distill", torch.device("cpu"), rank=rank)
        assert planned(skeleton, lora=rank).moved == sum(p.numel() for p in student.trained)


def test_less_is_asked_for_where_less_is_kept(skeleton: Skeleton) -> None:
    plain = planned(skeleton)
    assert planned(skeleton, gradient_checkpointing=True).memory < plain.memory
    assert planned(skeleton, gradient_checkpointing=True).seconds(1e9) > plain.seconds(1e9)
    assert planned(skeleton, lora=4).memory < plain.memory
    assert planned(skeleton, batch=16, sequences=64).memory > plain.memory
    assert planned(skeleton, data="text.txt").seconds(1e9) < plain.seconds(1e9)
    assert planned(skeleton, on_policy=0.5).seconds(1e9) > plain.seconds(1e9)


def test_a_share_is_what_a_process_takes(skeleton: Skeleton) -> None:
    training = Training("distill", shard=True, gradient_checkpointing=True, **SIZE)
    two, four = (Planned(training, skeleton, skeleton, (), n, n) for n in (2, 4))
    whole = replace(planned(skeleton, gradient_checkpointing=True), processes=4)
    assert four.memory < two.memory
    blocks = values_of(skeleton) - 2 * 4096 * 256 - 256
    divided = cost.FLOAT * (blocks + cost.SHARED_COPIES * whole.moved)
    found = two.memory - two.training.batch // 2 * two._activations
    found -= four.memory - four.training.batch // 4 * four._activations
    assert found == pytest.approx(divided / 4, abs=8)
    # That of several of one machine is told together, and a model is read by one at a time.
    assert four.needed == 4 * four.memory + cost.FLOAT * 3 * values_of(skeleton)


def test_the_batch_that_fits_several_processes_is_shared_by_them(
    skeleton: Skeleton, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = (replace(planned(skeleton, batch=b), processes=2, here=2) for b in (8, 4))
    monkeypatch.setattr(cost, "available_bytes", lambda: two.needed + 1)
    with pytest.raises(RecipeError, match=r"in 2 processes, .* are free; batch: 4 fits"):
        require_memory(one, "train distill")


def test_the_batch_that_fits_is_named(skeleton: Skeleton, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = planned(skeleton)
    two = planned(skeleton, batch=2).memory
    monkeypatch.setattr(cost, "available_bytes", lambda: two)
    with pytest.raises(RecipeError, match=r"takes about .* are free; batch: 2 fits"):
        require_memory(wanted, "train distill")
    monkeypatch.setattr(cost, "available_bytes", lambda: 2**20)
    with pytest.raises(RecipeError, match=r"are free$"):
        require_memory(wanted, "train distill")
