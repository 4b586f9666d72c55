"""Adapters: what moves, what it comes to in the checkpoint, and where none can be merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compress_methods import convert, recover
from compress_methods.checkpoint.compressed import read_entries
from compress_methods.checkpoint.loading.model import load_model
from compress_methods.errors import RecipeError
from compress_methods.evaluation.offline import all_logits
from compress_methods.recipe.training import Training
from compress_methods.training.recover import write_changed
from compress_methods.training.student import Student

CPU = torch.device("cpu")
RANK = 4
QUICK: dict[str, Any] = {"steps": 10, "batch": 4, "sequences": 40, "held_out": 4, "length": 48}
SMALL = {"samples": 4, "length": 64, "held_out": 2}


def lowrank(**more: Any) -> dict[str, Any]:
    base = {"format": "integer", "bits": 4, "group_size": 128}
    return {
        "formats": {"w": {"format": "lowrank", "rank": RANK, "base": base, **more}},
        "modules": [{"match": "blocks", "format": "w", "algorithm": "svd"}],
        "calibration": SMALL,
    }


@pytest.fixture(scope="module")
def pruned(novels_8m: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pruned") / "out"
    recipe = {"stages": [{"transform": "depth", "drop": 2}], "calibration": SMALL}
    convert(novels_8m, recipe, out, quiet=True)
    return out


def tensors_of(directory: Path) -> dict[str, Tensor]:
    return {name: entry.read() for name, entry in read_entries(directory).items()}


def test_adapters_start_as_nothing_and_are_few(pruned: Path) -> None:
    student = Student(pruned, "distill", CPU, rank=RANK)
    row = torch.arange(40) + 100
    with torch.no_grad():
        found = student(row[None])[0]
    torch.testing.assert_close(found, all_logits(load_model(pruned), row), rtol=1e-4, atol=1e-4)
    matrices = [t for name, t in tensors_of(pruned).items() if ".layers." in name and t.dim() == 2]
    assert sum(p.numel() for p in student.trained) == sum(RANK * sum(m.shape) for m in matrices)


def test_what_is_merged_is_what_was_trained(pruned: Path, tmp_path: Path) -> None:
    student = Student(pruned, "distill", CPU, rank=RANK)
    generator = torch.Generator().manual_seed(0)
    row = torch.arange(40) + 100
    with torch.no_grad():
        for parameter in student.trained:
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        expected = student(row[None])[0]
    write_changed(pruned, tmp_path, student.stored())
    found = all_logits(load_model(tmp_path), row)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - all_logits(load_model(pruned), row)).abs().max() > 0.1


def test_a_pruned_model_heals_by_adapters(pruned: Path, novels_8m: Path, tmp_path: Path) -> None:
    settings = Training("distill", lora=RANK, rate=0.02, **QUICK)
    facts = recover(pruned, novels_8m, tmp_path / "out", settings, quiet=True)["training"][0]
    assert facts["held_out"]["kl"] < 0.97 * facts["before"]["kl"]
    before, after = tensors_of(pruned), tensors_of(tmp_path / "out")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if ".layers." in name and before[name].dim() == 2}


def test_factors_of_low_rank_matrices_train_and_nothing_else(
    novels_8m: Path, tmp_path: Path
) -> None:
    convert(novels_8m, lowrank(), tmp_path / "packed", quiet=True)
    settings = Training("distill", lora=RANK, **{**QUICK, "steps": 2})
    recover(tmp_path / "packed", novels_8m, tmp_path / "out", settings, quiet=True)
    before, after = tensors_of(tmp_path / "packed"), tensors_of(tmp_path / "out")
    moved = {n.rpartition(".")[2] for n in before if not torch.equal(before[n], after[n])}
    assert moved == {"weight_left", "weight_right"}
    with pytest.raises(RecipeError, match=f"factors of rank {RANK}, expected lora {RANK}, found 8"):
        Student(tmp_path / "packed", "distill", CPU, rank=8)


def test_other_packed_checkpoints_are_refused(novels_8m: Path, tmp_path: Path) -> None:
    convert(novels_8m, "int4-rtn", tmp_path / "packed", quiet=True)
    settings = Training("sft", lora=RANK, **QUICK)
    with pytest.raises(RecipeError, match="is packed as integer, which no adapter can be merged"):
        recover(tmp_path / "packed", novels_8m, tmp_path / "out", settings, quiet=True)
    with pytest.raises(RecipeError, match="lora is for distill and sft, not for scales"):
        Training("scales", lora=RANK)
