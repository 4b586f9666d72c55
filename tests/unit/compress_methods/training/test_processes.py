"""Two processes over gloo train what one would, and refuse what they cannot share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from compress_methods import convert, recover
from compress_methods.checkpoint.compressed import read_entries
from compress_methods.checkpoint.integrity import find_damaged
from compress_methods.checkpoint.loading.tied import open_skeleton
from compress_methods.conversion.running import Running
from compress_methods.errors import RecipeError
from compress_methods.model.skeleton import Skeleton
from compress_methods.recipe.training import Training
from compress_methods.system.processes import Processes
from compress_methods.training.cost import values_of
from compress_methods.training.recover import open_pair

SIZE: dict[str, Any] = {"steps": 4, "batch": 4, "sequences": 16, "held_out": 4, "length": 32}


def launched(
    *arguments: str, module: str = "vllm_compress.cli"
) -> subprocess.CompletedProcess[str]:
    """The command, or another module, in two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--standalone", "-m", module, *arguments]
    alone = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=240, env={**os.environ, **alone}
    )


@pytest.fixture(scope="module")
def alone(
    pruned: Path, novels_8m: Path, some_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """What one process makes."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("alone") / "out"
    settings = Training("distill", data=str(some_text), **SIZE)
    recover(pruned, novels_8m, out, settings, device="cpu", quiet=True)
    return out


def facts_of(directory: Path) -> dict[str, Any]:
    report = json.loads((directory / "report.json").read_text(encoding="utf-8"))
    found: dict[str, Any] = report["training"][0]
    return found


def require_same_training(one: Path, other: Path, start: Path, steps: int = 4) -> None:
    """Curves are the same for so many steps, and values those of the same way."""
    facts = [facts_of(directory) for directory in (one, other)]
    mine, theirs = (torch.tensor(each["held_out_curve"])[: steps + 1] for each in facts)
    torch.testing.assert_close(mine, theirs, rtol=2e-3, atol=2e-3)
    assert len(mine) == steps + 1
    assert facts[1]["best"] == steps
    assert facts[1]["held_out"]["kl"] < 0.95 * facts[1]["before"]["kl"]
    name = "model.layers.1.mlp.up_proj.weight"
    begun, *ends = (read_entries(place)[name].read().float() for place in (start, one, other))
    assert torch.cosine_similarity(*((end - begun).flatten() for end in ends), dim=0) > 0.9


@pytest.mark.slow
def test_two_processes_train_what_one_would(
    alone: Path, pruned: Path, novels_8m: Path, some_text: Path, tmp_path: Path
) -> None:
    options = [f"--{key.replace('_', '-')}={value}" for key, value in SIZE.items()]
    options += ["--train=distill", "--data", str(some_text), "--device=cpu"]
    out = tmp_path / "two"
    command = ["recover", str(pruned), "--teacher", str(novels_8m), "-o", str(out), *options]
    run = launched(*command)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("serve it:") == 1
    require_same_training(alone, out, pruned)
    assert not (out / ".work").exists()


SMALL = {"steps": 2, "batch": 2, "sequences": 4, "held_out": 1, "length": 16}
PACKING = {
    "formats": {"w": {"format": "integer", "bits": 4, "group_size": 128}},
    "modules": [{"match": "blocks", "format": "w", "algorithm": "gptq"}],
}


def recipe_of(text: Path) -> dict[str, Any]:
    train = {"train": "distill", "data": str(text), **SMALL}
    calibration = {"samples": 2, "length": 16, "held_out": 2}
    stages = [{"transform": "depth", "keep": [0, 7]}, train, PACKING]
    return {"stages": stages, "calibration": calibration}


@pytest.fixture(scope="module")
def together(
    pruned: Path, novels_8m: Path, some_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, Any]]]:
    """What two processes made, and say."""
    out = tmp_path_factory.mktemp("together")
    (out / "recipe.yaml").write_text(json.dumps(recipe_of(some_text)), encoding="utf-8")
    given = [str(path) for path in (pruned, novels_8m, some_text)]
    given += [json.dumps(SIZE), str(out / "recipe.yaml"), str(out)]
    run = launched(*given, module="tests.unit.compress_methods.training.sharing")
    assert run.returncode == 0, run.stderr
    return out, json.loads(run.stdout)


@pytest.mark.slow
def test_each_of_two_processes_holds_a_share_and_goes_on_after_a_kill(
    together: tuple[Path, list[dict[str, Any]]], alone: Path, pruned: Path, novels_8m: Path
) -> None:
    out, told = together
    require_same_training(alone, out / "shared", pruned, steps=3)
    assert facts_of(out / "shared")["held_out_curve"][4][1] > 1.5  # it was spoiled
    assert [one["steps"] for one in told] == [[1, 2, 3, 3, 4]] * 2
    student, teacher = (open_skeleton(path) for path in (pruned, novels_8m))
    moved, around = values_of(student), values_of(student) - values_in_blocks(student)
    for one in told:
        assert one["moved"] <= 0.51 * moved
        assert one["moments"] == 2 * one["moved"]
        # Itself, two moments and the start; of the teacher what surrounds the blocks is whole.
        share = (4 * moved + values_in_blocks(teacher)) / 2
        assert one["everything"] < share + 1.6 * around
    assert sum(one["moved"] for one in told) == moved


def values_in_blocks(skeleton: Skeleton) -> int:
    return sum(one.numel() for block in skeleton.blocks for one in block.parameters())


@pytest.mark.slow
def test_two_processes_carry_out_a_recipe_that_trains(
    together: tuple[Path, list[dict[str, Any]]], novels_8m: Path, some_text: Path, tmp_path: Path
) -> None:
    """The depth by one of them, the training and the packing by both; killed before the packing."""
    out, told = together[0] / "staged", together[1]
    assert [one["segments"] for one in told] == [[0, 1, 2, 2]] * 2
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert [stage["stage"] for stage in report["stages"]] == ["depth", "train distill", "packing"]
    assert report["run"]["device"].endswith("2 processes")
    torch.set_num_threads(1)
    given: dict[str, Any] = {"calibration": some_text, "device": "cpu", "quiet": True}
    by_one = convert(novels_8m, recipe_of(some_text), tmp_path / "alone", **given)
    curves = [torch.tensor(one["training"][0]["held_out_curve"]) for one in (report, by_one)]
    torch.testing.assert_close(*curves, rtol=2e-3, atol=2e-3)
    assert report["held_out"]["kl"] == pytest.approx(by_one["held_out"]["kl"], rel=0.05)
    assert not find_damaged(out)
    assert not (out / ".work").exists()


def test_what_several_processes_made_is_not_taken_for_what_one_makes(
    pruned: Path, novels_8m: Path, some_text: Path
) -> None:
    settings = Training("distill", data=str(some_text), **SIZE)
    one = Running(torch.device("cpu"))
    both = [
        open_pair(pruned, novels_8m, settings, x)
        for x in (one, replace(one, processes=Processes(2)))
    ]
    assert both[0].fingerprint != both[1].fingerprint


def test_a_batch_that_cannot_be_shared_is_refused(
    pruned: Path, novels_8m: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(RecipeError, match="batch is 4, expected a multiple of 3 processes"):
        recover(pruned, novels_8m, tmp_path / "out", Training("distill", **SIZE), quiet=True)
    recipe = {"stages": [{"transform": "depth", "keep": [0]}, {"train": "distill", **SIZE}]}
    with pytest.raises(RecipeError, match="batch is 4, expected a multiple of 3 processes"):
        convert(novels_8m, recipe, tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_divided_is_refused(pruned: Path, novels_8m: Path, tmp_path: Path) -> None:
    alone = Training("distill", shard=True, **SIZE)
    with pytest.raises(RecipeError, match="there is 1; start it with torchrun"):
        recover(pruned, novels_8m, tmp_path / "out", alone, quiet=True)
    more: list[dict[str, Any]] = [{"on_policy": 0.5}, {"match": {"hidden": 1.0}}, {"train": "qat"}]
    for one in more:
        with pytest.raises(RecipeError, match=f"shard and {next(iter(one))}.* do not go together"):
            Training(**{"train": "distill", **one}, shard=True)
