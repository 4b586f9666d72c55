"""Sparse matrices are served as they are stored, in the memory they are stored in."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.conversion.memory import make_llama
from tests.e2e.serving.test_quality import compare
from tests.e2e.support.engine import Engine
from tests.e2e.support.tiny import SPARSE, compress, reference

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

SHAPE = {"hidden_size": 1536, "intermediate_size": 6144}


def test_every_value_format_serves_what_is_stored(
    engine: Engine, novels_8m: Path, novel_tokens: list[list[int]], tmp_path: Path
) -> None:
    model = compress(
        novels_8m,
        tmp_path / "mixed",
        SPARSE,
        {
            r"re:model\.layers\.[0-2]\..*": "half-int8",
            r"re:model\.layers\.[3-5]\..*": "2of4-int4",
            "blocks": "half-bfloat16",
            "embedding": "half-int8",
            "lm_head": "half-bfloat16",
        },
    )
    logprobs, top = reference(model, novel_tokens[:4])
    for kernel, bound in (("cpu_exact", 1e-3), ("reference", 1e-5), ("", 0.05)):
        env = {"VLLM_COMPRESS_KERNEL": kernel}
        result = engine.run(model, novel_tokens[:4], dtype="float32", env=env)
        difference, agreement = compare(result, logprobs, top)
        print(f"{kernel or 'default'}: {difference:.6f} nats, {agreement:.2%} same top token")
        assert difference < bound
        assert agreement > 0.95


def test_half_of_int8_takes_at_most_65_percent_of_its_memory(tmp_path: Path) -> None:
    """Resident memory that three more layers take, so that nothing but weights counts."""
    resident, values = [], []
    with Engine() as fresh:
        for layers in (1, 4):
            dense, model = tmp_path / f"dense{layers}", tmp_path / f"half{layers}"
            values.append(make_llama(dense, {**SHAPE, "num_hidden_layers": layers}, 1, 1024) // 2)
            compress(dense, model, {"w": SPARSE["half-int8"]}, {"blocks": "w"})
            # As little KV cache as there can be: each layer has some, and it is no weight.
            options = {"max_model_len": 128, "num_gpu_blocks_override": 2}
            result = fresh.run(model, [[1, 2, 3]], dtype="bfloat16", **options)
            assert not result.error, result.error
            resident.append(result.resident)
    half, int8 = resident[1] - resident[0], values[1] - values[0]
    print(f"{half / 2**20:.0f} MiB, of a byte for every value {half / int8:.2f}")
    assert 0.5 * int8 < half <= 0.65 * int8
