"""vLLM loads codes with the scales of a task, and computes what the trained model does."""

from __future__ import annotations

from pathlib import Path

import pytest

from compress_methods import convert
from compress_methods.checkpoint.compressed import read_entries
from compress_methods.conversion.exchange.scales import split_scales
from compress_methods.training.recover import write_changed
from tests.e2e.methods.test_lowrank import EXACT, WORST, worst
from tests.e2e.support.engine import Engine
from tests.e2e.support.tiny import reference
from tests.unit.compress_methods.conversion.exchange.test_scales import RECIPE

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def test_a_base_is_served_with_the_scales_of_a_task(
    engine: Engine, novels_8m: Path, novel_tokens: list[list[int]], tmp_path: Path
) -> None:
    base, trained = tmp_path / "base", tmp_path / "trained"
    convert(novels_8m, RECIPE, base, quiet=True)
    trained.mkdir()
    moved = {
        name: entry.read() * (0.8 if "up_proj" in name else 1.2)
        for name, entry in read_entries(base).items()
        if name.endswith(("_scales", "norm.weight"))
    }
    write_changed(base, trained, moved)
    assert len(split_scales(trained, base, tmp_path / "task")) == len(moved)
    scales = {"scales": str(tmp_path / "task")}
    options = {"load_format": "vllm_compress", "model_loader_extra_config": scales}
    prompts = novel_tokens[:2]
    found = engine.run(base, prompts, dtype="float32", env=EXACT, **options)
    plain = engine.run(base, prompts, dtype="float32", env=EXACT)
    assert worst(found, reference(trained, prompts)[0]) < WORST
    assert worst(plain, reference(base, prompts)[0]) < WORST
    assert worst(plain, reference(trained, prompts)[0]) > 1
    wrong = engine.run(trained, prompts, dtype="float32", env=EXACT, **options)
    assert "report.json" in wrong.error
