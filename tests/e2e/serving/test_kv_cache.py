"""A cache of keys and values in FP8 is served with the scales of the checkpoint, where the server
asks for one: as vLLM's kernel for CPUs cuts values, log-probabilities are those of transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compress_methods import convert
from compress_methods.checkpoint.loading.kv_cache import read_scales, rounded_cache
from compress_methods.checkpoint.loading.model import load_model
from compress_methods.evaluation.offline import all_logits
from tests.e2e.support.engine import Engine

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


@pytest.mark.skipif(not torch.cpu._is_avx512_supported(), reason="vLLM's FP8 cache needs AVX-512")
def test_served_with_its_scales(
    engine: Engine,
    novels_8m: Path,
    some_text: Path,
    novel_tokens: list[list[int]],
    tmp_path: Path,
) -> None:
    recipe = {
        "formats": {"w8": {"format": "integer", "bits": 8, "group_size": -1}},
        "modules": [{"match": "blocks", "format": "w8"}],
        "calibration": {"samples": 8, "length": 64, "held_out": 2},
        "kv_cache": "fp8",
    }
    convert(novels_8m, recipe, tmp_path / "out", calibration=some_text, quiet=True)
    tokens = novel_tokens[0][:96]
    model = load_model(tmp_path / "out")
    with rounded_cache(model, read_scales(tmp_path / "out"), "fp8-cpu"):
        rounded = all_logits(model, torch.tensor(tokens))
    expected = rounded.log_softmax(-1)[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
    found = {
        kind: engine.run(tmp_path / "out", [tokens], dtype="float32", kv_cache_dtype=kind)
        for kind in ("fp8", "auto")
    }
    assert not found["fp8"].error, found["fp8"].error
    apart = {
        kind: float((torch.tensor(one.logprobs[0][-len(expected) :]) - expected).abs().mean())
        for kind, one in found.items()
    }
    assert apart["fp8"] < 0.01
    assert found["fp8"].logprobs != found["auto"].logprobs
