"""Checkpoints trained towards their original: what is written, kept, resumed and refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from compress_methods import convert, recover
from compress_methods.checkpoint.compressed import read_entries
from compress_methods.checkpoint.integrity import find_damaged
from compress_methods.checkpoint.loading.model import load_model
from compress_methods.errors import CalibrationError, CheckpointError, CompressError, RecipeError
from compress_methods.evaluation.offline import all_logits
from compress_methods.formats import MAIN_TENSOR
from compress_methods.recipe.training import Training
from compress_methods.training import recover as recovering
from compress_methods.training import trainer
from compress_methods.training.objectives.losses import divergence
from compress_methods.training.student import Student
from tests.unit.compress_methods.training.killed import Killed, dying
from vllm_compress.cli import main

CPU = torch.device("cpu")
QUICK: dict[str, Any] = {"steps": 10, "batch": 4, "sequences": 40, "held_out": 4, "length": 64}
INT2 = {
    "formats": {"w": {"format": "integer", "bits": 2, "group_size": 128, "levels": "mid"}},
    "modules": [{"match": "blocks", "format": "w", "algorithm": {"algorithm": "rtn"}}],
}


def quick(train: str = "scales", **more: Any) -> Training:
    return Training(train, **{**QUICK, **more})


@pytest.fixture(scope="module")
def int2(novels_8m: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("int2") / "out"
    convert(novels_8m, INT2, out, quiet=True)
    return out


@pytest.fixture(scope="module")
def trained(int2: Path, novels_8m: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By the command, scales alone."""
    out = tmp_path_factory.mktemp("trained") / "out"
    options = [f"--{key.replace('_', '-')}={value}" for key, value in QUICK.items()]
    command = ["recover", str(int2), "--teacher", str(novels_8m), "-o", str(out), *options]
    assert main([*command, "--rate", "0.02", "--quiet"]) == 0
    return out


def report_of(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "report.json").read_text(encoding="utf-8"))
    return found


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return {name: entry.read() for name, entry in read_entries(directory).items()}


def test_scales_win_back_and_codes_stay(trained: Path, int2: Path) -> None:
    facts = report_of(trained)["training"][0]
    assert facts["held_out"]["kl"] < 0.8 * facts["before"]["kl"]
    assert facts["best"] > 0
    assert [step for step, _ in facts["held_out_curve"]] == list(range(11))
    assert facts["loss_curve"]
    before, after = tensors_of(int2), tensors_of(trained)
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.rpartition(".")[2] for name in moved} == {"weight_scales", "weight"}
    assert not any(MAIN_TENSOR in name or "embed" in name or "head" in name for name in moved)
    assert all(before[name].dtype == after[name].dtype for name in before)
    assert not find_damaged(trained)
    assert "Trained (`scales`)" in (trained / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("method", ["scales", "distill", "qat"])
def test_a_student_computes_what_its_files_say(method: str, trained: Path) -> None:
    row = torch.arange(40) + 100
    student = Student(trained, method, CPU)
    with torch.no_grad():
        found = student(row[None])[0]
    torch.testing.assert_close(found, all_logits(load_model(trained), row), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["scales", "distill", "qat"])
def test_what_is_written_is_what_was_trained(method: str, int2: Path, tmp_path: Path) -> None:
    student = Student(int2, method, CPU)
    generator = torch.Generator().manual_seed(0)
    row = torch.arange(40) + 100
    with torch.no_grad():
        for parameter in student.trained:
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
        student.limit()
        expected = student(row[None])[0]
    recovering.write_changed(int2, tmp_path, student.stored())
    found = all_logits(load_model(tmp_path), row)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_codes_train_beside_scales(int2: Path, novels_8m: Path, tmp_path: Path) -> None:
    report = recover(int2, novels_8m, tmp_path / "out", quick("qat", rate=0.02), quiet=True)
    facts = report["training"][0]
    assert facts["held_out"]["kl"] < 0.8 * facts["before"]["kl"]


def test_a_step_against_the_gradient_of_codes_lowers_the_kl(
    int2: Path, novels_8m: Path, tmp_path: Path
) -> None:
    student = Student(int2, "qat", CPU)
    row = torch.arange(64)[None] + 100
    with torch.no_grad():
        wanted = load_model(novels_8m)(input_ids=row).logits
    before = divergence(wanted, student(row), 0.0)
    before.backward()
    codes = student.trained[0]
    assert codes.grad is not None
    with torch.no_grad():
        step = -codes.grad.sign()
        reached = codes.round() + step
        gain = codes.grad.abs() * ((reached >= 0) & (reached <= 3))
        at = int(gain.argmax())
        codes.view(-1)[at] += step.flatten()[at]
        after = divergence(wanted, student(row), 0.0)
    assert 0.5 < (before - after).item() / gain.max().item() < 1.5
    recovering.write_changed(int2, tmp_path, student.stored())
    old, new = tensors_of(int2), tensors_of(tmp_path)
    (name,) = {name for name in old if not torch.equal(old[name], new[name])}
    assert name.endswith(MAIN_TENSOR)
    assert (old[name] != new[name]).sum() == 1


def test_a_pruned_model_heals_on_text_of_the_users_and_stays_a_plain_one(
    novels_8m: Path, some_text: Path, tmp_path: Path
) -> None:
    calibration = {"samples": 4, "length": 64, "held_out": 2}
    recipe = {"stages": [{"transform": "depth", "drop": 2}], "calibration": calibration}
    convert(novels_8m, recipe, tmp_path / "pruned", quiet=True)
    settings = quick("distill", loss={"jsd": 0.5}, rate=0.005, data=str(some_text))
    report = recover(tmp_path / "pruned", novels_8m, tmp_path / "out", settings, quiet=True)
    facts = report["training"][0]
    assert facts["loss"] == {"jsd": 0.5}
    assert facts["data"] == some_text.name
    assert facts["text"].startswith(some_text.name)
    assert facts["held_out"]["kl"] < 0.9 * facts["before"]["kl"]
    assert report["dropped"]
    assert [stage["stage"] for stage in report["stages"]] == ["depth", "train distill"]
    assert load_model(tmp_path / "out").config.num_hidden_layers == 6


def test_a_killed_training_goes_on_to_the_same_bytes(
    trained: Path,
    int2: Path,
    novels_8m: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings, out = quick(rate=0.02), tmp_path / "out"
    steps: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(trainer._Watcher, "on_step_end", dying(steps, 5))
        with pytest.raises(Killed):
            recover(int2, novels_8m, out, settings, quiet=True)
        # A checkpoint that was being written when the power went.
        torn = shutil.copytree(
            out / ".work" / "checkpoints" / "checkpoint-4",
            out / ".work" / "checkpoints" / "checkpoint-5",
        )
        (Path(torn) / trainer.WHOLE).unlink()
        (Path(torn) / "trainer_state.json").write_text("{")
        recover(int2, novels_8m, out, settings, quiet=True)
    assert steps == [1, 2, 3, 4, 5, 5, 6, 7, 8, 9, 10]
    assert not (out / ".work").exists()
    expected, found = tensors_of(trained), tensors_of(out)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    mine, theirs = (report_of(place)["training"][0] for place in (out, trained))
    assert mine["held_out_curve"] == theirs["held_out_curve"]
    assert mine["loss_curve"] == theirs["loss_curve"]


def test_finished_it_is_not_done_again(
    trained: Path, int2: Path, novels_8m: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovering, "_make", None)
    report = recover(int2, novels_8m, trained, quick(rate=0.02), quiet=True)
    assert report == report_of(trained)


def test_a_training_that_diverges_leaves_the_start_and_says_so(
    int2: Path, novels_8m: Path, tmp_path: Path
) -> None:
    report = recover(int2, novels_8m, tmp_path / "out", quick(rate=50.0), quiet=True)
    facts = report["training"][0]
    assert facts["note"].startswith("diverged: ")
    assert facts["best"] == 0
    before, after = tensors_of(int2), tensors_of(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.fixture
def other(novels_8m: Path, tmp_path: Path) -> Path:
    """The same model with one token called otherwise."""
    place = Path(shutil.copytree(novels_8m, tmp_path / "other"))
    path = place / "tokenizer.json"
    path.chmod(0o644)
    text = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = text["model"]["vocab"]
    merged = {token for merge in text["model"]["merges"] for token in merge}
    whole = {"".join(merge) for merge in text["model"]["merges"]} | merged
    token = next(t for t in reversed(vocabulary) if t not in whole or len(t) > 8)
    vocabulary[f"{token}~"] = vocabulary.pop(token)
    text["model"]["merges"] = [m for m in text["model"]["merges"] if "".join(m) != token]
    path.write_text(json.dumps(text), encoding="utf-8")
    return place


def test_a_teacher_of_another_vocabulary_is_refused(
    int2: Path, other: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="tokens differ from those of"):
        recover(int2, other, tmp_path / "out", quick(), quiet=True)
    assert not (tmp_path / "out").exists()


def test_data_without_the_needed_fields_is_refused_by_line(
    int2: Path, novels_8m: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "one"}\n{"words": 2}\n')
    with pytest.raises(CalibrationError, match=r"data\.jsonl:2"):
        recover(int2, novels_8m, tmp_path / "out", quick(data=str(data)), quiet=True)


def test_without_the_extra_one_line_says_what_to_install(
    int2: Path, novels_8m: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovering, "find_spec", lambda name: None)
    with pytest.raises(CompressError, match=r"pip install 'vllm-compress\[train\]'"):
        recover(int2, novels_8m, tmp_path / "out", quick(), quiet=True)


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ({"train": "scale"}, "did you mean 'scales'"),
        (
            {"train": "qat", "loss": "x"},
            "loss is 'x', expected kl, reverse_kl, ce, topk_kl or",
        ),
        ({"train": "qat", "loss": {"jsd": 1}}, "jsd is 1, expected a number between 0 and 1"),
        ({"train": "qat", "steps": 0}, "steps is 0, expected 1 or more"),
        ({"train": "qat", "sequences": 2}, "batch is 8, expected at most the 2 sequences"),
        ({"train": "qat", "beta": 0.5}, "unknown key 'beta'"),
        ({"train": "qat", "rates": 0.5}, "unknown key 'rates'"),
        ({"train": "qat", "rate": -1.0}, "rate is -1.0, expected"),
        ({"train": "qat", "on_policy": 1.5}, "on_policy is 1.5, expected a share from 0 to 1"),
        ({"train": "qat", "match": {"hiden": 1}}, "match: unknown 'hiden'; did you mean 'hidden'"),
        ({"train": "qat", "match": {"hidden": 0}}, "match: hidden is 0, expected a number above"),
        ({"train": "sft", "match": {"hidden": 1}}, "match needs a loss of kl"),
        ({"train": "qat", "teacher_mix": 0.2}, "teacher_mix needs `loss: reverse_kl` and"),
    ],
)
def test_bad_stages_are_refused_by_key(block: dict[str, Any], said: str) -> None:
    from compress_methods.recipe.stages import load_staged

    with pytest.raises(RecipeError) as problem:
        load_staged({"stages": [{"transform": "depth", "drop": 2}, block]})
    assert "stages[1]" in str(problem.value)
    assert said in str(problem.value)
