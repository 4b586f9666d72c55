"""The time of a step by the roofline."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress_methods.formats.floats import Float
from compress_methods.formats.integer import Integer
from compress_methods.formats.tensor_train import TensorTrain
from compress_methods.formats.wrappers.lowrank import LowRank
from compress_methods.formats.wrappers.rotated import Rotated
from vllm_compress.operations.capacity.footprint.memory import Layout
from vllm_compress.operations.capacity.footprint.shapes import load_shape
from vllm_compress.operations.capacity.footprint.storage import Scheme, apply_recipe, as_it_is
from vllm_compress.operations.capacity.hardware import (
    find_hardware,
)
from vllm_compress.operations.capacity.throughput.performance import (
    EFFICIENCY,
    compute_rate,
    kernel_refusal,
    roofline,
)

H100 = find_hardware("h100-80gb")
LLAMA = load_shape("llama-3.1-8b")


def scheme(recipe: str | None) -> Scheme:
    return as_it_is(LLAMA) if recipe is None else apply_recipe(LLAMA, recipe)


def test_one_token_takes_as_long_as_reading_the_weights() -> None:
    """Published for this model on this GPU: about 7 ms per token in bf16."""
    found = roofline(scheme(None), H100, Layout()).seconds(1, 1, 0, 0)
    read = scheme(None).weight_bytes - 128256 * 4096 * 2  # all but the token table
    e = EFFICIENCY["gpu"]
    expected = read / 3.35e12 / e.bandwidth + e.step + e.sequence
    assert found == pytest.approx(expected, rel=1e-3)
    assert 0.005 < found < 0.009


@given(st.integers(1, 4000), st.integers(0, 500), st.floats(0, 1e6), st.floats(0, 1e7))
def test_more_work_never_takes_less_time(tokens: int, sampled: int, context: float, pairs: float):
    for recipe in (None, "int4-gptq"):
        step = roofline(scheme(recipe), H100, Layout())
        base = step.seconds(tokens, sampled, context, pairs)
        assert base <= step.seconds(tokens + 1, sampled, context, pairs)
        assert base <= step.seconds(tokens, sampled + 1, context, pairs)
        assert base < step.seconds(tokens, sampled, context + 1e5, pairs)
        assert base < step.seconds(tokens, sampled, context, pairs + 1e7)


@pytest.mark.parametrize("ways", [2, 4, 8])
def test_more_devices_make_steps_shorter_but_not_in_proportion(ways: int) -> None:
    one, more = (roofline(scheme(None), H100, Layout(tp)) for tp in (1, ways))
    for tokens in (1, 2000):
        whole, part = (s.seconds(tokens, 1, 0, 0) for s in (one, more))
        assert whole / ways < part < whole


def test_4_bits_win_at_one_token_and_8_bit_activations_at_many() -> None:
    bf16, int4, w8a8 = (
        roofline(scheme(r), H100, Layout()) for r in (None, "int4-gptq", "int8-dynamic")
    )
    assert int4.seconds(1, 1, 0, 0) < w8a8.seconds(1, 1, 0, 0) < bf16.seconds(1, 1, 0, 0)
    assert w8a8.seconds(4000, 1, 0, 0) < 0.6 * int4.seconds(4000, 1, 0, 0)


def test_few_tokens_read_few_experts() -> None:
    step = roofline(as_it_is(load_shape("deepseek-v3")), H100, Layout(8))
    assert step.body_seconds(1) < 0.1 * step.body_seconds(256)


def test_formats_without_a_gpu_kernel_are_planned_for_cpus_only() -> None:
    """Ours in Triton is one; a product with cores of a tensor train has none."""
    for recipe in ("int3-gptq", "nf4", "nvfp4", "int4-rotated", "int2-lowrank", "sparse68"):
        assert kernel_refusal(scheme(recipe), H100) is None
    block = next(part for part in scheme(None).parts if part.matrix.kind == "blocks")
    mixed = replace(scheme(None), parts=(replace(block, format=TensorTrain(8)),))
    assert "no GPU kernel for train of" in (kernel_refusal(mixed, H100) or "")
    assert kernel_refusal(mixed, find_hardware("epyc-genoa-2s")) is None


def test_floats_of_four_bits_meet_int8_activations_on_cpus_alone() -> None:
    epyc = find_hardware("epyc-genoa-2s")
    for kind in ("mxfp4", "nvfp4"):
        assert compute_rate(Float(kind), epyc) == compute_rate(Integer(4, 128), epyc)
        assert compute_rate(Float(kind), H100) == compute_rate(None, H100)
    assert compute_rate(Float("fp8"), epyc) == compute_rate(None, epyc)


def test_a_low_rank_product_is_planned_as_its_base() -> None:
    epyc = find_hardware("epyc-genoa-2s")
    for base in (Integer(4, 128), Rotated(Integer(8, 128))):
        assert compute_rate(LowRank(16, base), epyc) == compute_rate(base, epyc)
    assert compute_rate(LowRank(16), H100) == compute_rate(None, H100)
