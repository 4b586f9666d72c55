"""Divergences of a student's predictions from its teacher's."""

from __future__ import annotations

import pytest
import torch

from compress_methods.evaluation.metrics import token_kl
from compress_methods.training.objectives.losses import divergence


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    teacher, student = 3 * torch.randn(2, 7, 11, 50, generator=generator)
    return teacher, student.requires_grad_()


def test_the_ends_are_kl_and_reverse_kl(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    teacher, student = pair
    rows = teacher.flatten(0, 1), student.detach().flatten(0, 1)
    torch.testing.assert_close(divergence(*pair, 0.0), token_kl(*rows).mean())
    torch.testing.assert_close(divergence(*pair, 1.0), token_kl(*rows[::-1]).mean())


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_between_them_it_is_the_definition(
    pair: tuple[torch.Tensor, torch.Tensor], beta: float
) -> None:
    p, q = (logits.detach().double().softmax(-1) for logits in pair)
    m = beta * p + (1 - beta) * q
    wanted = beta * (p * (p / m).log()).sum(-1) + (1 - beta) * (q * (q / m).log()).sum(-1)
    torch.testing.assert_close(divergence(*pair, beta).double(), wanted.mean(), rtol=1e-4, atol=0)


def test_small_betas_divided_by_themselves_approach_the_end(
    pair: tuple[torch.Tensor, torch.Tensor],
) -> None:
    teacher, student = pair[0].double(), (pair[0] + 0.1 * pair[1]).double()
    near = divergence(teacher, student, 1e-2) / 1e-2
    torch.testing.assert_close(near, divergence(teacher, student, 0.0), rtol=0.02, atol=0)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_equal_predictions_pull_nowhere(beta: float) -> None:
    logits = torch.randn(5, 20, generator=torch.Generator().manual_seed(1))
    student = logits.clone().requires_grad_()
    loss = divergence(logits, student, beta)
    loss.backward()
    assert student.grad is not None
    assert abs(loss.item()) < 1e-6
    assert student.grad.abs().max() < 1e-6


def test_what_the_teacher_rules_out_costs_nothing_in_kl() -> None:
    teacher = torch.tensor([[0.0, 1.0, -torch.inf]])
    student = torch.zeros(1, 3, requires_grad=True)
    assert divergence(teacher, student, 0.0).isfinite()
