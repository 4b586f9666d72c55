"""A model whose bits were chosen layer by layer is served as it is stored."""

from __future__ import annotations

from pathlib import Path

import pytest

from compress_methods import convert
from compress_methods.checkpoint.compressed import open_compressed
from tests.benchmarks.loss.bits import automatic
from tests.e2e.serving.test_quality import compare
from tests.e2e.support.engine import Engine
from tests.e2e.support.tiny import reference

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
FEW = {"samples": 8, "length": 128, "held_out": 0}


def test_automatic_bits_are_served_as_they_are_stored(
    engine: Engine,
    novels_8m: Path,
    some_text: Path,
    novel_tokens: list[list[int]],
    tmp_path: Path,
) -> None:
    wanted = {**automatic(3.5, ("t3", "w4")), "calibration": FEW}
    out = tmp_path / "out"
    report = convert(novels_8m, wanted, out, calibration=some_text, quiet=True)
    assert report["compressed_bits_per_weight"] <= 3.5
    assert len({m.format for m in open_compressed(out).matrices.values()}) == 2
    logprobs, top = reference(out, novel_tokens[:4])
    result = engine.run(
        out, novel_tokens[:4], dtype="float32", env={"VLLM_COMPRESS_KERNEL": "cpu_exact"}
    )
    difference, agreement = compare(result, logprobs, top)
    print(f"{difference:.6f} nats, {agreement:.2%} same top token")
    assert difference < 1e-3
    assert agreement > 0.99
