"""What was trained is served as transformers computes with it, and so as it was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from compress_methods import convert
from compress_methods.training.student import Student
from tests.e2e.serving.test_quality import compare
from tests.e2e.support.engine import Engine
from tests.e2e.support.tiny import reference

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

WORST = 0.02
QUICK: dict[str, Any] = {"steps": 10, "batch": 4, "sequences": 40, "held_out": 4, "length": 64}
RECIPE: dict[str, Any] = {
    "stages": [
        {
            "formats": {"w": {"format": "integer", "bits": 2, "group_size": 128, "levels": "mid"}},
            "modules": [{"match": "blocks", "format": "w"}],
        },
        {"train": "scales", "rate": 0.02, **QUICK},
    ],
    "calibration": {"samples": 4, "length": 64, "held_out": 2},
}


def test_served_as_the_student_computed_in_training(
    engine: Engine,
    novels_8m: Path,
    novel_tokens: list[list[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    students: list[Student] = []

    def keep(*args: Any) -> Student:
        students.append(Student(*args))
        return students[-1]

    monkeypatch.setattr("compress_methods.training.recover.Student", keep)
    report = convert(novels_8m, RECIPE, tmp_path / "out", quiet=True)
    assert report["training"][0]["best"] > 0
    logprobs, top = reference(tmp_path / "out", novel_tokens[:4])
    (student,) = students
    for tokens, expected in zip(novel_tokens[:4], logprobs, strict=True):
        with torch.no_grad():
            found = student(torch.tensor([tokens]))[0].log_softmax(-1)
        own = found[:-1].gather(-1, torch.tensor(tokens)[1:, None]).flatten().tolist()
        assert own == pytest.approx(expected, abs=1e-3)
    env = {"VLLM_COMPRESS_KERNEL": "cpu_exact"}
    result = engine.run(tmp_path / "out", novel_tokens[:4], dtype="float32", env=env)
    assert not result.error, result.error
    difference, agreement = compare(result, logprobs, top)
    print(f"mean difference {difference:.6f} nats")
    assert difference < WORST
    assert agreement > 0.95
