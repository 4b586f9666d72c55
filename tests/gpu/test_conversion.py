"""Conversion on a GPU: what the CPU makes, within the rounding of sums, at one block of memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compress_methods import convert
from compress_methods.evaluation.offline import evaluate

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

CALIBRATION = {"samples": 16, "length": 128, "held_out": 4}


@pytest.mark.parametrize("algorithm", ["rtn", "gptq", "sparsegpt", "alps", "wanda"])
def test_gpu_loses_no_more_than_the_cpu(
    algorithm: str, novels_8m: Path, some_text: Path, tmp_path: Path
) -> None:
    fmt = {"format": "integer", "bits": 4, "group_size": 128}
    if algorithm not in ("rtn", "gptq"):
        fmt = {"format": "sparse", "n": 64, "m": 128, "values": {**fmt, "group_size": -1}}
    recipe = {
        "formats": {"w": fmt},
        "modules": [{"match": "blocks", "format": "w", "algorithm": algorithm}],
        "calibration": CALIBRATION,
    }
    found = {}
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        report = convert(novels_8m, recipe, out, calibration=some_text, device=device, quiet=True)
        found[device] = report["held_out"]["kl"]
        assert (report["run"]["peak_device_bytes"] is not None) == (device == "cuda")
    assert found["cuda"] == pytest.approx(found["cpu"], rel=0.05)


def test_forward_passes_in_the_models_own_dtype(
    novels_8m: Path, some_text: Path, tmp_path: Path
) -> None:
    report = convert(
        novels_8m, "int4-gptq", tmp_path / "out", calibration=some_text, device="cuda",
        dtype=torch.bfloat16, quiet=True,
    )  # fmt: skip
    assert report["held_out"]["kl"] < 0.1


def test_models_are_compared_on_the_gpu(novels_8m: Path, some_text: Path, tmp_path: Path) -> None:
    convert(novels_8m, "int4-rtn", tmp_path / "out", device="cuda", quiet=True)
    pair = (tmp_path / "out", novels_8m, some_text)
    on = {d: evaluate(*pair, limit_tokens=1000, device=d) for d in ("cpu", "cuda")}
    assert on["cuda"].kl == pytest.approx(on["cpu"].kl, rel=0.02)
