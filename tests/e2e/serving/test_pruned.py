"""Pruned models are plain models: a vLLM that has never heard of us serves them, and computes what
transformers does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from compress_methods import convert
from tests.e2e.support.engine import Engine
from tests.e2e.support.tiny import make_model

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

DEPTH = {"transform": "depth", "drop": "25%"}
WIDTH = {"transform": "width", "ffn": "25%", "attention": "50%", "tensor_parallel": 2}
BOTH = [{"transform": "depth", "drop": 1}, {**WIDTH, "ffn": "50%", "multiple": 32}]
MODELS: dict[str, tuple[str | None, list[dict[str, Any]]]] = {
    "novels-8m, depth": (None, [DEPTH]),
    "novels-8m, width": (None, [WIDTH]),
    "Qwen2": ("Qwen2", BOTH),
    "Qwen3": ("Qwen3", BOTH),
    "Mistral": ("Mistral", BOTH),
}
IS_GONE = """
from importlib.metadata import entry_points
from importlib.util import find_spec
assert find_spec("vllm") is not None
assert find_spec("vllm_compress") is None
assert find_spec("compress_methods") is None
names = {entry.value for group in ("vllm.general_plugins", "vllm.stat_logger_plugins")
         for entry in entry_points(group=group)}
assert not any("vllm_compress" in name for name in names), names
"""


@pytest.fixture(scope="module")
def without_us(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment, for `python -S`, with every installed distribution but ours."""
    pytest.importorskip("vllm")
    site = tmp_path_factory.mktemp("site")
    for installed in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for path in Path(installed).iterdir():
            ours = "vllm_compress" in path.name or "compress_methods" in path.name
            if path.suffix != ".pth" and not ours and not (site / path.name).exists():
                (site / path.name).symlink_to(path)
    environment = {"PYTHONPATH": str(site)}
    subprocess.run(
        [sys.executable, "-S", "-c", IS_GONE], env={**os.environ, **environment}, check=True
    )
    return environment


@pytest.fixture(scope="module")
def stock(without_us: dict[str, str]) -> Iterator[Engine]:
    with Engine(without_us, ("-S",)) as running:
        yield running


@pytest.mark.parametrize("name", list(MODELS))
def test_stock_vllm_computes_what_transformers_does(
    name: str, stock: Engine, novels_8m: Path, some_text: Path, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    kind, stages = MODELS[name]
    model = novels_8m
    if kind is not None:
        changes = {"num_hidden_layers": 3, "vocab_size": 4096}
        model = make_model(kind, tmp_path / "model", **changes)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(novels_8m / file, model)
    recipe = {"stages": stages, "calibration": {"samples": 4, "length": 64, "held_out": 2}}
    out = tmp_path / "out"
    convert(model, recipe, out, calibration=some_text, quiet=True)
    prompts = [list(range(5, 60)), list(range(900, 990))]
    result = stock.run(out, prompts, dtype="float32")
    assert not result.error, result.error
    reference = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    for prompt, found in zip(prompts, result.logprobs, strict=True):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            scores = reference(ids).logits[0, :-1].log_softmax(-1)
        expected = scores.gather(1, ids[0, 1:, None])[:, 0].tolist()
        assert found == pytest.approx(expected, abs=1e-3)
    assert "vllm_compress" not in stock.log
