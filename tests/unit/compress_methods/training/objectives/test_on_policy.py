"""Text that a student writes itself: whose it is, what of it counts, and MiniLLM's gradient."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compress_methods import recover
from compress_methods.calibration.self_generated import drawn
from compress_methods.checkpoint.compressed import read_entries
from compress_methods.checkpoint.loading.model import load_model
from compress_methods.recipe.training import Training
from compress_methods.training import trainer
from compress_methods.training.objectives import on_policy
from compress_methods.training.objectives.on_policy import (
    Written,
    end_tokens,
    is_turn,
    sequence_loss,
    write,
)
from compress_methods.training.student import Student
from tests.unit.compress_methods.training.killed import Killed, dying

CPU = torch.device("cpu")
ROWS, LENGTH, WORDS = 6, 24, 3


def settings_of(mix: float = 0.0, seed: int = 1) -> Training:
    return Training("distill", "reverse_kl", on_policy=1.0, teacher_mix=mix, seed=seed)


@pytest.fixture(scope="module")
def teacher(novels_8m: Path) -> Any:
    return load_model(novels_8m)


@pytest.fixture(scope="module")
def student(novels_8m: Path) -> Student:
    """The teacher with a head that makes it less sure of everything."""
    found = Student(novels_8m, "distill", CPU)
    with torch.no_grad():
        for piece, leaves in found.paired():
            if piece.slots == ["lm_head.weight"] or "lm_head" in str(piece.slots[0]):
                leaves["values"].mul_(0.7)
    return found


@pytest.fixture(scope="module")
def given() -> Tensor:
    return torch.randint(100, 4000, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))


def test_half_of_the_steps_is_every_second_one() -> None:
    assert [is_turn(step, 0.5) for step in range(6)] == [False, True] * 3
    assert sum(is_turn(step, 0.3) for step in range(100)) == 30
    assert not any(is_turn(step, 0.0) for step in range(10))
    assert all(is_turn(step, 1.0) for step in range(10))


@pytest.mark.parametrize("mix", [0.0, 0.4])
def test_what_follows_a_beginning_is_drawn_from_the_student_and_the_teacher(
    student: Student, teacher: Any, given: Tensor, mix: float
) -> None:
    written = write(student, teacher, given, settings_of(mix), step=3)
    again = write(student, teacher, given, settings_of(mix), step=3)
    assert all(torch.equal(getattr(written, n), getattr(again, n)) for n in vars(written))
    assert not torch.equal(
        written.tokens, write(student, teacher, given, settings_of(mix), step=4).tokens
    )
    begins = written.chosen.long().argmax(1) + 1
    assert 1 <= begins.min() < begins.max() <= LENGTH // 2
    draws = torch.rand(LENGTH, ROWS, generator=torch.Generator().manual_seed(on_policy.SPREAD + 3))
    with torch.no_grad():
        q = student(written.tokens).softmax(-1)
        p = teacher(input_ids=written.tokens).logits.softmax(-1)
    both = mix * p + (1 - mix) * q
    for row, begin in enumerate(begins.tolist()):
        assert torch.equal(written.tokens[row, :begin], given[row, :begin])
        assert (written.weights[row, : begin - 1] == 0).all()
        for place in range(begin, LENGTH):
            found = written.tokens[row, place]
            assert found == drawn(both[row, place - 1 : place], draws[place, row : row + 1])
            weight = q[row, place - 1, found] / both[row, place - 1, found]
            assert written.weights[row, place - 1].item() == pytest.approx(weight.item(), rel=1e-3)


def test_what_follows_an_end_does_not_count(
    student: Student, teacher: Any, given: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert end_tokens(teacher) == [0]
    plain = write(student, teacher, given, settings_of(), step=0)
    assert plain.chosen[0, LENGTH // 2 :].sum() == LENGTH // 2 - 1
    ending = int(plain.tokens[0, LENGTH // 2])
    monkeypatch.setattr(on_policy, "end_tokens", lambda _: [ending])
    found = write(student, teacher, given, settings_of(), step=0)
    assert torch.equal(found.tokens, plain.tokens)
    first = int((plain.tokens[0] == ending)[: LENGTH // 2 + 1].long().argmax())
    assert found.chosen[0, first - 1] or first < int(found.chosen[0].long().argmax())
    assert not found.chosen[0, LENGTH // 2 :].any()
    assert (found.weights[0, LENGTH // 2 :] == 0).all()


def texts(rows: int) -> Iterator[tuple[Tensor, ...]]:
    """Every pair of words after a beginning of one, for every row."""
    for words in product(range(WORDS), repeat=2 * rows):
        yield tuple(torch.tensor(words).reshape(rows, 2))


def logits_of(first: Tensor, second: Tensor, words: Tensor) -> Tensor:
    """[rows, 3, WORDS] of a model of two words, the second of which depends on the first."""
    unused = torch.zeros(len(words), WORDS)
    return torch.stack([first.expand(len(words), -1), second[words[:, 0]], unused], 1)


@pytest.mark.parametrize("rows", [1, 2])
def test_its_mean_gradient_is_that_of_the_whole_texts_divergence(rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    student = [torch.randn(WORDS, generator=generator), torch.randn(WORDS, WORDS)]
    teacher = [torch.randn(WORDS, generator=generator), torch.randn(WORDS, WORDS)]
    for part in student:
        part.requires_grad_()
    q, p = (first.softmax(-1)[:, None] * second.softmax(-1) for first, second in (student, teacher))
    exact = torch.autograd.grad((q * (q / p).log()).sum(), student)
    used = torch.tensor([[1.0, 1.0, 0.0]]).expand(rows, -1)
    mean = torch.zeros(())
    for pairs in texts(rows):
        words = torch.stack(pairs)
        likely = q.detach()[words[:, 0], words[:, 1]].prod()
        begun = torch.nn.functional.pad(words, (1, 0))
        written = Written(begun, used, used > 0)
        loss = sequence_loss(logits_of(*teacher, words), logits_of(*student, words), written)
        mean = mean + likely * loss
    for found, wanted in zip(torch.autograd.grad(mean, student), exact, strict=True):
        torch.testing.assert_close(2 * found, wanted, rtol=1e-4, atol=1e-6)


def test_a_killed_training_on_its_own_text_goes_on_to_the_same_bytes(
    novels_8m: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compress_methods import convert

    small = {"samples": 4, "length": 64, "held_out": 2}
    recipe = {"stages": [{"transform": "depth", "drop": 4}], "calibration": small}
    convert(novels_8m, recipe, tmp_path / "pruned", quiet=True)
    settings = Training(
        "distill",
        "reverse_kl",
        steps=6,
        batch=2,
        sequences=8,
        held_out=2,
        length=24,
        on_policy=0.5,
        teacher_mix=0.2,
    )

    def trained(out: Path) -> dict[str, Tensor]:
        recover(tmp_path / "pruned", novels_8m, out, settings, quiet=True)
        return {name: entry.read() for name, entry in read_entries(out).items()}

    whole = trained(tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(trainer._Watcher, "on_step_end", dying([], 4))
        with pytest.raises(Killed):
            trained(tmp_path / "killed")
    found = trained(tmp_path / "killed")
    assert all(torch.equal(whole[name], found[name]) for name in whole)
