"""`vllm-compress recover`: options as the settings of a training."""

from __future__ import annotations

from typing import Any

import pytest

import compress_methods
from compress_methods.recipe.training import Training
from vllm_compress.cli import main

FACTS = {"best": 1, "steps": 2, "note": ""}
QUALITY = {"kl": 0.1, "perplexity": 5.0, "base_perplexity": 4.0}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Training]:
    """The settings of every training that the command asks for."""
    found: list[Training] = []

    def recover(model: str, teacher: str, out: str, settings: Training, **_: Any) -> Any:
        found.append(settings)
        return {"training": [{**FACTS, "before": QUALITY, "held_out": QUALITY}]}

    monkeypatch.setattr(compress_methods, "recover", recover)
    return found


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ([], Training("scales", "kl")),
        (["--train", "sft", "--data", "a.jsonl"], Training("sft", "ce", data="a.jsonl")),
        (
            ["--loss", "jsd:0.5", "--on-policy", "0.5"],
            Training("scales", {"jsd": 0.5}, on_policy=0.5),
        ),
        (
            ["--loss", "reverse_kl", "--on-policy", "1", "--teacher-mix", "0.2"],
            Training("scales", "reverse_kl", on_policy=1.0, teacher_mix=0.2),
        ),
        (["--train", "distill", "--lora", "8"], Training("distill", lora=8)),
        (
            ["--match", "hidden:1,attention:0.5"],
            Training("scales", match={"hidden": 1.0, "attention": 0.5}),
        ),
    ],
)
def test_options_are_settings(options: list[str], wanted: Training, asked: list[Training]) -> None:
    assert main(["recover", "a", "--teacher", "b", "-o", "c", *options]) == 0
    assert asked == [wanted]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--match", "hidden"], "match: hidden is '', expected a number above 0"),
        (["--loss", "jsd:much"], "jsd is 'much', expected a number between 0 and 1"),
        (["--lora", "8"], "lora is for distill and sft, not for scales"),
    ],
)
def test_bad_options_are_one_line(
    options: list[str], said: str, asked: list[Training], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["recover", "a", "--teacher", "b", "-o", "c", *options]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not asked
