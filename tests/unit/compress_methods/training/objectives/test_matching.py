"""Inner states to train by: which are matched, how they are measured, and the map learnt."""

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
from compress_methods.training.objectives.matching import Matcher, attention_divergence, even_pairs
from compress_methods.training.objectives.objective import Objective
from compress_methods.training.student import Student

CPU = torch.device("cpu")
QUICK: dict[str, Any] = {"steps": 4, "batch": 2, "sequences": 8, "held_out": 2, "length": 32}


def numbered(count: int) -> list[Tensor]:
    return [torch.tensor(float(i)) for i in range(count)]


def test_layers_are_matched_evenly_and_the_ends_with_the_ends() -> None:
    states = even_pairs(numbered(9), numbered(7), first=0)
    assert [int(theirs) for theirs, _ in states] == [0, 1, 3, 4, 5, 7, 8]
    layers = even_pairs(numbered(8), numbered(4), first=1)
    assert [int(theirs) for theirs, _ in layers] == [1, 3, 5, 7]
    same = numbered(5)
    assert all(a is b for a, b in even_pairs(same, same, first=0))


def model_of(width: int) -> Any:
    config = SimpleNamespace(hidden_size=width)
    config.get_text_config = lambda: config
    return SimpleNamespace(config=config, device=CPU)


def out_of(*states: Tensor) -> Any:
    return SimpleNamespace(logits=torch.zeros(1), hidden_states=states, attentions=None)


def test_hidden_states_count_by_their_own_size() -> None:
    generator = torch.Generator().manual_seed(0)
    wanted = torch.randn(2, 3, 8, generator=generator)
    matcher = Matcher({"hidden": 2.0}, model_of(8), model_of(8))
    assert matcher.map is None
    found = matcher.loss(out_of(wanted, 100 * wanted), out_of(0.9 * wanted, 90 * wanted))
    torch.testing.assert_close(found, torch.tensor(2 * 0.01))


def test_a_map_is_learnt_where_widths_differ() -> None:
    generator = torch.Generator().manual_seed(0)
    narrow = torch.randn(4, 30, 5, generator=generator)
    wanted = narrow @ torch.randn(5, 8, generator=generator)
    matcher = Matcher({"hidden": 1.0}, model_of(8), model_of(5))
    assert matcher.map is not None
    optimizer = torch.optim.Adam([matcher.map], 0.05)
    losses = []
    for _ in range(200):
        loss = matcher.loss(out_of(wanted, wanted), out_of(narrow, narrow))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(1)
    assert losses[-1] < 0.01


def test_attentions_are_held_against_each_other_by_head_or_by_their_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 2, 4, 5, 5, generator=generator).softmax(-1)
    exact = (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(attention_divergence(p, q), exact)
    fewer = attention_divergence(p, q[:, :2])
    means = p.mean(1), q[:, :2].mean(1)
    torch.testing.assert_close(fewer, (means[0] * (means[0] / means[1]).log()).sum(-1).mean())


@pytest.fixture(scope="module")
def narrow(novels_8m: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with the teacher's vocabulary that has learnt nothing."""
    from transformers import AutoConfig, AutoModelForCausalLM

    out = tmp_path_factory.mktemp("narrow") / "out"
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 32}
    config = AutoConfig.from_pretrained(
        novels_8m, **sizes, num_key_value_heads=1, intermediate_size=96
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(out)
    for path in novels_8m.glob("token*.json"):
        (out / path.name).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    assert json.loads((out / "config.json").read_text(encoding="utf-8"))["hidden_size"] == 64
    return out


def settings_of(**more: Any) -> Training:
    return Training("distill", match={"hidden": 1.0, "attention": 0.5}, **{**QUICK, **more})


def test_the_teacher_itself_is_not_apart(novels_8m: Path) -> None:
    student, teacher = Student(novels_8m, "distill", CPU), load_model(novels_8m)
    objective = Objective(settings_of(), teacher, student)
    tokens = torch.randint(100, 4000, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert objective.learned(student, {"input_ids": tokens}, 0) < 1e-4


def test_gradients_reach_the_student_and_the_map(novels_8m: Path, narrow: Path) -> None:
    student, teacher = Student(narrow, "distill", CPU), load_model(novels_8m)
    objective = Objective(settings_of(), teacher, student)
    tokens = torch.randint(100, 4000, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        student.beside[0].normal_(generator=torch.Generator().manual_seed(1))
        wanted, found, _ = objective._both(student, tokens)
        plain = torch.nn.functional.kl_div(
            found.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="none"
        )
    loss = objective.learned(student, {"input_ids": tokens}, 0)
    assert loss > plain.sum(-1).mean() + 0.5
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in (*student.trained, *student.beside))
    rates = [id(p) for group in student.groups(1.0) for p in group["params"]]
    assert id(student.beside[0]) in rates


def test_a_narrow_student_is_trained_and_its_map_forgotten(
    narrow: Path, novels_8m: Path, tmp_path: Path
) -> None:
    report = recover(narrow, novels_8m, tmp_path / "out", settings_of(rate=0.02), quiet=True)
    facts = report["training"][0]
    assert facts["match"] == {"hidden": 1.0, "attention": 0.5}
    assert facts["held_out"]["kl"] < facts["before"]["kl"]
    assert load_model(tmp_path / "out").config.hidden_size == 64


def test_a_model_that_tells_nothing_of_its_attention_is_refused() -> None:
    matcher = Matcher({"hidden": 1.0}, model_of(4), model_of(4))
    matcher.weights = {"attention": 1.0}
    with pytest.raises(RecipeError, match="tells nothing of its attention"):
        matcher.loss(out_of(), out_of())
