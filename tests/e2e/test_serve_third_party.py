"""A format that only another distribution knows converts, loads and serves: nothing but its class
and an entry point is needed, in every process vLLM starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.engine import REPOSITORY, Engine
from tests.e2e.tiny import make_model

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

MODULE = '''
"""ternary: -1, 0 or 1 times a scale per row, one byte each."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from compress_methods.formats import Axis, Format, TensorSpec, register_format


@register_format
@dataclass(frozen=True)
class Ternary(Format):
    threshold: float = 0.7
    name: ClassVar[str] = "ternary"

    def tensors(self, rows, cols):
        return {
            "weight_packed": TensorSpec((rows, cols), torch.int8, Axis(0), Axis(1)),
            "weight_magnitude": TensorSpec((rows, 1), torch.float32, Axis(0)),
        }

    def nearest(self, weight):
        cut = self.threshold * weight.abs().mean(1, keepdim=True)
        kept = weight.abs() > cut
        scale = (weight.abs() * kept).sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp(min=1)
        return weight.sign() * kept, scale

    def values(self, solution):
        return solution[0] * solution[1]

    def pack(self, solution):
        signs, scale = solution
        return {"weight_packed": signs.to(torch.int8), "weight_magnitude": scale.float()}

    def unpack(self, tensors):
        return tensors["weight_packed"].float() * tensors["weight_magnitude"]
'''
CONVERT = """
import sys
from pathlib import Path
from tests.e2e.tiny import compress, reference
import json
model, out, prompts = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
compress(model, out, {"t": {"format": "ternary", "threshold": 0.5}}, {"blocks": "t"})
print(json.dumps(reference(out, prompts)[0]))
"""


def test_a_format_of_another_distribution(tmp_path: Path) -> None:
    import json

    site = tmp_path / "site"
    metadata = site / "ternary_format-1.0.dist-info"
    metadata.mkdir(parents=True)
    (site / "ternary_format.py").write_text(MODULE)
    (metadata / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: ternary-format\nVersion: 1.0\n"
    )
    (metadata / "entry_points.txt").write_text(
        "[vllm_compress.formats]\nternary = ternary_format:Ternary\n"
    )
    model = make_model("Llama", tmp_path / "model")
    prompts = [[5, 6, 7, 8, 9, 300, 20]]
    env = {"PYTHONPATH": os.pathsep.join([str(site), str(REPOSITORY)])}
    converted = subprocess.run(
        [sys.executable, "-c", CONVERT, str(model), str(tmp_path / "out"), json.dumps(prompts)],
        env={**os.environ, **env},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert converted.returncode == 0, converted.stderr
    expected = json.loads(converted.stdout.splitlines()[-1])
    with Engine(env) as engine:
        result = engine.run(tmp_path / "out", prompts, dtype="float32")
        assert not result.error, result.error
        assert "no fast kernel for ternary on cpu" in engine.log
    assert result.logprobs[0] == pytest.approx(expected[0], abs=1e-3)
