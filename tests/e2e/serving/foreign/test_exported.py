"""What is exported is served by a vLLM that knows nothing of this plugin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compress_methods import convert
from tests.e2e.support.engine import Engine
from tests.e2e.support.tiny import make_model, reference

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

PROMPTS = [[5, 6, 7, 8, 9, 300, 20, 21, 22, 23], [400, 401, 3, 77, 150]]
INT4 = {"format": "integer", "bits": 4, "group_size": 128, "symmetric": True}
INT8 = {"format": "integer", "bits": 8, "group_size": -1, "activations": "int8"}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "compressed-tensors int4": ("compressed-tensors", INT4),
    "compressed-tensors int8 dynamic": ("compressed-tensors", INT8),
    "gptq int4": ("gptq", {**INT4, "scale_dtype": "float16"}),
}


def test_stock_vllm_serves_every_export(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    model = make_model("Llama", tmp_path / "model")
    with Engine({"VLLM_PLUGINS": ""}) as stock:
        for name, (layout, fmt) in CASES.items():
            recipe = {"formats": {"w": fmt}, "modules": [{"match": "blocks", "format": "w"}]}
            recipe["calibration"] = {"held_out": 0}
            out = tmp_path / name.replace(" ", "-")
            convert(model, recipe, out, layout=layout, quiet=True)
            result = stock.run(out, PROMPTS, dtype="bfloat16")
            assert not result.error, (name, result.error)
            for got, wanted in zip(result.logprobs, reference(out, PROMPTS)[0], strict=True):
                assert got == pytest.approx(wanted, abs=0.15), name
        assert "vllm-compress" not in stock.log
