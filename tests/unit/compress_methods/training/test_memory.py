"""What trains in less memory learns the same: chunks of logits, blocks computed again, predictions
written down."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from compress_methods import recover
from compress_methods.checkpoint.loading.model import load_model
from compress_methods.errors import RecipeError
from compress_methods.recipe.training import Training
from compress_methods.system.progress import Progress
from compress_methods.training import noted
from compress_methods.training import recover as recovering
from compress_methods.training.lessons import TOP_LOGPROBS, TOP_TOKENS
from compress_methods.training.material import collate, plain_rows
from compress_methods.training.objectives import chunks
from compress_methods.training.objectives.losses import divergence
from compress_methods.training.objectives.objective import Objective
from compress_methods.training.student import Student
from tests.unit.compress_methods.training.killed import Killed

CPU = torch.device("cpu")
SIZE: dict[str, Any] = {"steps": 4, "batch": 2, "sequences": 8, "held_out": 2, "length": 32}


def rows(count: int = 2, length: int = 24) -> Tensor:
    return torch.randint(1, 4096, (count, length), generator=torch.Generator().manual_seed(0))


def gradients(pruned: Path, teacher: Any, recompute: bool = False, **more: Any) -> list[Tensor]:
    """The loss of one step, and what goes back to the student."""
    student = Student(pruned, "distill", CPU)
    if recompute:
        student.recompute()
    objective = Objective(Training("distill", **{**SIZE, **more}), teacher, student)
    tokens = rows()
    tops = teacher(input_ids=tokens).logits.detach().log_softmax(-1).topk(4)
    tops.values[0, 3:5] = -torch.inf
    batch = {"input_ids": tokens, "counted": tokens % 3 > 0}
    batch |= {TOP_TOKENS: tops.indices, TOP_LOGPROBS: tops.values}
    loss = objective.learned(student, batch, 0)
    loss.backward()
    return [loss.detach(), *(p.grad for p in student.trained if p.grad is not None)]


@pytest.mark.parametrize("loss", ["kl", "reverse_kl", {"jsd": 0.5}, "ce", "topk_kl"])
def test_in_chunks_loss_and_gradients_are_the_same(
    loss: Any, pruned: Path, novels_8m: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = load_model(novels_8m)
    expected = gradients(pruned, teacher, loss=loss)
    sizes: list[int] = []
    logits = chunks.Predicted.logits

    def seen(self: Any, states: Tensor) -> Tensor:
        sizes.append(len(states))
        return logits(self, states)

    monkeypatch.setattr(chunks.Predicted, "logits", seen)
    monkeypatch.setattr(chunks, "LIMIT", 10 * 4096)
    found = gradients(pruned, teacher, loss=loss)
    assert set(sizes) == {2, 10, 8}  # the heads that are compared; 48 positions in tens
    assert len(expected) == len(found) > 20
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_a_model_that_caps_its_logits_is_computed_whole(novels_8m: Path) -> None:
    model = load_model(novels_8m)
    tokens, forward = rows(), type(model).forward

    def capped(logits_to_keep: int = 0, **given: Any) -> Any:
        out = forward(model, logits_to_keep=logits_to_keep, **given)
        return SimpleNamespace(logits=out.logits.tanh())

    plain = chunks.predicted(model, model, {}, tokens)
    assert plain.weight is not None
    wanted = model(input_ids=tokens).logits
    torch.testing.assert_close(plain.logits(plain.states), wanted, rtol=1e-4, atol=1e-4)
    whole = chunks.predicted(model, capped, {}, tokens)
    assert whole.weight is None
    torch.testing.assert_close(whole.states, wanted.tanh())


def test_blocks_computed_again_give_the_same_gradients(
    pruned: Path, novels_8m: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = load_model(novels_8m)
    expected, found = (gradients(pruned, teacher, recompute=again) for again in (False, True))
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)


def test_only_what_goes_into_blocks_is_kept(pruned: Path) -> None:
    def kept(again: bool) -> int:
        student, sizes = Student(pruned, "distill", CPU), []
        if again:
            student.recompute()
        values = student.values()

        def pack(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            student.run(values, input_ids=rows(2, 64), use_cache=False)
        return sum(sizes)

    assert kept(True) < 0.5 * kept(False)


def test_what_the_teacher_says_is_written_down_once(novels_8m: Path, tmp_path: Path) -> None:
    teacher, text = load_model(novels_8m), plain_rows(rows(5))
    with Progress(5, "", quiet=True) as progress:
        found = noted.note_all(teacher, text, 4096, 2, tmp_path / "noted", progress)
        batch = collate(found)
        wanted = teacher(input_ids=batch["input_ids"]).logits.log_softmax(-1)
        told = torch.zeros_like(wanted).scatter(-1, batch[TOP_TOKENS], batch[TOP_LOGPROBS])
        torch.testing.assert_close(told, wanted, rtol=1e-3, atol=1e-3)
        again = noted.note_all(None, text, 4096, 2, tmp_path / "noted", progress)
        assert torch.equal(again[4][TOP_TOKENS], found[4][TOP_TOKENS])
        (part,) = (tmp_path / "noted").iterdir()
        part.write_bytes(part.read_bytes()[:-1])
        with pytest.raises(AttributeError):  # there is no teacher to ask again
            noted.note_all(None, text, 4096, 2, tmp_path / "noted", progress)


def test_with_all_tokens_the_loss_is_the_kl(pruned: Path, novels_8m: Path, tmp_path: Path) -> None:
    teacher, student = load_model(novels_8m), Student(pruned, "distill", CPU)
    with Progress(2, "", quiet=True) as progress:
        text = noted.note_all(teacher, plain_rows(rows()), 4095, 2, tmp_path / "noted", progress)
    objective = Objective(Training("distill", top_k=4095, **SIZE), None, student)
    with torch.no_grad():
        found = objective.learned(student, collate(text), 0)
        wanted = divergence(teacher(input_ids=rows()).logits, student(rows()), 0.0)
    torch.testing.assert_close(found, wanted, rtol=2e-3, atol=2e-3)


def test_a_student_learns_from_what_was_written_down_and_goes_on_from_it(
    pruned: Path, novels_8m: Path, some_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Training(
        "distill", data=str(some_text), top_k=32, gradient_checkpointing=True, **SIZE
    )
    monkeypatch.setattr(noted, "PART", 4)
    written: list[int] = []
    ask = noted._noted

    def dying(teacher: Any, some: Any, *rest: Any) -> Any:
        written.append(len(some))
        if len(written) == 2:
            raise Killed
        return ask(teacher, some, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(noted, "_noted", dying)
        with pytest.raises(Killed):
            recover(pruned, novels_8m, tmp_path / "out", settings, quiet=True)
        report = recover(pruned, novels_8m, tmp_path / "out", settings, quiet=True)
    assert written == [4, 4, 4, 2]
    facts = report["training"][0]
    assert facts["top_k"] == 32
    assert facts["held_out"]["kl"] < facts["before"]["kl"]
    assert not (tmp_path / "out" / ".work").exists()
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"loss": "reverse_kl"}, "top_k needs `loss: kl`"),
        ({"on_policy": 0.5}, "top_k needs `loss: kl`, without on_policy"),
        ({"top_k": 5000}, "top_k is 5000, expected at most the 4096 tokens"),
    ],
)
def test_what_cannot_be_written_down_is_refused(
    more: dict[str, Any], said: str, pruned: Path, novels_8m: Path, tmp_path: Path
) -> None:
    def ask() -> None:
        settings = Training("distill", **{**SIZE, "top_k": 8, **more})
        recovering.open_pair(pruned, novels_8m, settings, recovering.Running())

    with pytest.raises(RecipeError) as problem:
        ask()
    assert said in str(problem.value)
