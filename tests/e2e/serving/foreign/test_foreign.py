"""Checkpoints that other tools quantized run on our CPU product, and mean what they meant."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compress_methods import import_checkpoint
from compress_methods.formats.integer import Integer
from tests.e2e.support.engine import Engine
from tests.e2e.support.foreign import write_foreign
from tests.e2e.support.tiny import make_model, reference

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

ASSETS = Path(__file__).parents[3] / "assets" / "interchange"
PROMPTS = [[5, 6, 7, 8, 9, 300, 20, 21, 22, 23], [400, 401, 3, 77, 150]]
CASES = {
    "compressed-tensors int4 g128": ("compressed-tensors", Integer(4, 128, scale_dtype="float16")),
    "compressed-tensors int4 row": ("compressed-tensors", Integer(4, -1, scale_dtype="float16")),
    "compressed-tensors int4 zeros": (
        "compressed-tensors",
        Integer(4, 32, symmetric=False, scale_dtype="float16"),
    ),
    "compressed-tensors int8 row": ("compressed-tensors", Integer(8, -1, scale_dtype="float16")),
    "compressed-tensors int8 zeros": (
        "compressed-tensors",
        Integer(8, 64, symmetric=False, scale_dtype="float16"),
    ),
    "compressed-tensors int8 with head": (
        "compressed-tensors",
        Integer(8, 128, scale_dtype="float16"),
        True,
    ),
    "gptq int4 g64 with head": ("gptq", Integer(4, 64, scale_dtype="float16"), True),
    "gptq int4 row": ("gptq", Integer(4, -1, scale_dtype="float16")),
    "awq int4 g32": ("awq", Integer(4, 32, symmetric=False, scale_dtype="float16")),
    "awq int4 g128 with head": (
        "awq",
        Integer(4, 128, symmetric=False, scale_dtype="float16"),
        True,
    ),
}
EXACT = {"VLLM_COMPRESS_KERNEL": "cpu_exact"}
SAID = "vllm-compress multiplies the"
# vLLM takes GPTQ and AWQ in 16 bits only: dtype, and by how much log-probabilities may differ.
PRECISION = {"compressed-tensors": ("float32", 2e-3), "gptq": ("bfloat16", 0.1)}
PRECISION["awq"] = PRECISION["gptq"]


@pytest.mark.parametrize("case", list(CASES))
def test_foreign_checkpoint_gives_what_its_stored_values_give(
    engine: Engine, tmp_path: Path, case: str
) -> None:
    layout, *rest = CASES[case]
    model = make_model("Llama", tmp_path / "model")
    packed, dense = write_foreign(model, tmp_path, layout, *rest)
    expected, _ = reference(dense, PROMPTS)
    before = engine.log.count(SAID)
    dtype, tolerance = PRECISION[layout]
    result = engine.run(packed, PROMPTS, dtype=dtype, env=EXACT)
    assert not result.error, result.error
    for got, wanted in zip(result.logprobs, expected, strict=True):
        assert got == pytest.approx(wanted, abs=tolerance)
    assert engine.log.count(SAID) <= before + 1


def test_columns_that_were_ordered_by_activation_are_refused(
    engine: Engine, tmp_path: Path
) -> None:
    """By vLLM, since the columns of a group are not neighbours then."""
    model = make_model("Llama", tmp_path / "model")
    fmt = Integer(4, 64, scale_dtype="float16")
    packed, _ = write_foreign(model, tmp_path, "gptq", fmt, desc_act=True)
    assert "desc_act=True" in engine.run(packed, PROMPTS, dtype="bfloat16").error


@pytest.mark.parametrize("name", ["gptq-desc-act", "gguf-q5_1", "bitsandbytes-nf4"])
def test_what_vllm_does_not_load_is_served_once_imported(
    engine: Engine, tmp_path: Path, name: str
) -> None:
    if "gguf" in name:
        pytest.importorskip("gguf")
    import_checkpoint(ASSETS / name, tmp_path / "o", quiet=True)
    found = json.loads((ASSETS / name / "expected.json").read_text())
    settings = {"dtype": "float32", "max_model_len": 128, "env": EXACT}
    result = engine.run(tmp_path / "o", [found["prompt"]], **settings)
    assert not result.error, result.error
    assert result.logprobs[0] == pytest.approx(found["logprobs"], abs=1e-3)


def test_groups_that_two_ranks_cut_are_refused_until_they_are_imported(
    engine: Engine, tmp_path: Path
) -> None:
    model = make_model("Llama", tmp_path / "model", intermediate_size=640)
    fmt = Integer(4, 128, scale_dtype="float16")
    packed, dense = write_foreign(model, tmp_path, "compressed-tensors", fmt)
    ranks = {"dtype": "float32", "tensor_parallel_size": 2, "env": EXACT}
    assert engine.run(packed, PROMPTS, **ranks).error
    assert "columns each would cut a group" in engine.log
    import_checkpoint(packed, tmp_path / "o", tensor_parallel_size=2, quiet=True)
    result = engine.run(tmp_path / "o", PROMPTS, **ranks)
    assert not result.error, result.error
    for got, wanted in zip(result.logprobs, reference(dense, PROMPTS)[0], strict=True):
        assert got == pytest.approx(wanted, abs=1e-3)


def test_with_vllm_forced_8_bits_have_no_kernel_again(engine: Engine, tmp_path: Path) -> None:
    model = make_model("Llama", tmp_path / "model")
    packed, _ = write_foreign(model, tmp_path, *CASES["compressed-tensors int8 row"])
    result = engine.run(packed, PROMPTS, dtype="float32", env={"VLLM_COMPRESS_KERNEL": "vllm"})
    assert "Failed to find a kernel" in result.error
