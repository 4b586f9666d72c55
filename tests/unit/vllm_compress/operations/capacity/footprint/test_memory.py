"""What fits where: hand-computed numbers, and vLLM's own functions."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_compress.operations.capacity.footprint.kept import Attention, State
from vllm_compress.operations.capacity.footprint.memory import (
    Layout,
    cache_of,
    fit,
    refusal,
    stage_layers,
    stage_weights,
)
from vllm_compress.operations.capacity.footprint.shapes import load_shape, shipped_shapes
from vllm_compress.operations.capacity.footprint.storage import Scheme, apply_recipe, as_it_is
from vllm_compress.operations.capacity.hardware import Hardware, find_hardware


@pytest.fixture(scope="module")
def h100() -> Hardware:
    return find_hardware("h100-80gb")


def smallest(scheme: Scheme, machine: Hardware) -> int:
    """Devices of the smallest layout that holds one request of 8,192 tokens."""
    ways = [Layout(tp, pp) for tp in range(1, 9) for pp in range(1, 5)]
    return min(w.devices for w in ways if fit(scheme, machine, w, 8192).reason is None)


def test_scout_needs_4_2_and_1_devices_where_weights_alone_say_3_2_and_1(h100: Hardware) -> None:
    shape = load_shape("llama-4-scout")
    schemes = [as_it_is(shape), apply_recipe(shape, "int8"), apply_recipe(shape, "int4-gptq")]
    alone = [math.ceil(s.weight_bytes / 80e9) for s in schemes]
    assert alone == [3, 2, 1]
    assert [smallest(s, h100) for s in schemes] == [4, 2, 1]


def test_three_devices_fail_scout_for_heads_or_for_the_last_few_gigabytes(h100: Hardware) -> None:
    scheme = as_it_is(load_shape("llama-4-scout"))
    assert refusal(scheme, Layout(3)) == "40 attention heads are not divisible by 3"
    found = fit(scheme, h100, Layout(1, 3), 8192)
    assert found.reason is not None
    assert found.weights < found.usable < found.weights + found.overhead


@pytest.mark.parametrize(
    ("name", "bytes_per_token"),
    [
        ("llama-4-scout", 48 * 2 * 8 * 128 * 2),
        ("llama-3.1-8b", 32 * 2 * 8 * 128 * 2),
        ("llama-3.2-1b", 16 * 2 * 8 * 64 * 2),
        ("deepseek-v3", 61 * (512 + 64) * 2),
    ],
)
def test_the_cache_of_short_requests_is_layers_times_heads(name: str, bytes_per_token: int) -> None:
    cache = cache_of(load_shape(name), Layout(), "gpu", 2, 8192)
    assert cache.blocks(4096) * cache.page_bytes == 4096 * bytes_per_token
    half = cache_of(load_shape(name), Layout(), "gpu", 1, 8192)
    assert half.page_bytes == cache.page_bytes // 2


def test_tensor_parallelism_cuts_heads_but_not_latents_and_copies_the_rest() -> None:
    llama, deepseek = load_shape("llama-3.1-8b"), load_shape("deepseek-v3")

    def page(shape: Any, tp: int) -> int:
        return cache_of(shape, Layout(tp), "gpu", 2, 8192).page_bytes

    assert [page(llama, 1) // page(llama, tp) for tp in (2, 4, 8, 16)] == [2, 4, 8, 8]
    assert page(deepseek, 8) == page(deepseek, 1)


def test_a_window_stops_the_cache_from_growing() -> None:
    gemma = load_shape("gemma-3-27b")
    cache = cache_of(gemma, Layout(), "gpu", 2, 2048)
    # 6 groups of local layers and 1 of global ones, 10 layers each, 2 of 62 of them padding.
    assert cache.groups == ((6, 1024, False), (1, None, False))
    assert cache.blocks(32000) - cache.blocks(16000) == 16000 // 16
    local = 6 * (math.ceil((1023 + 2048) / 16) + 1)
    assert cache.blocks(16000) == 16000 // 16 + local


@pytest.mark.parametrize(
    ("name", "recipe", "layout", "words"),
    [
        ("llama-3.1-8b", None, Layout(3), "32 attention heads are not divisible by 3"),
        ("llama-4-scout", None, Layout(5), "8 key-value heads"),
        ("llama-3.2-1b", None, Layout(1, 17), "16 layers are fewer than 17 stages"),
        ("qwen3-30b-a3b", "int4-gptq", Layout(8), "no multiple of 128"),
        ("gemma-3-27b", None, Layout(1, 4), None),
        ("qwen3-30b-a3b", "int8", Layout(8), None),
    ],
)
def test_splits_that_vllm_would_refuse(
    name: str, recipe: str | None, layout: Layout, words: str | None
) -> None:
    shape = load_shape(name)
    found = refusal(as_it_is(shape) if recipe is None else apply_recipe(shape, recipe), layout)
    assert found is None if words is None else found is not None and words in found


@pytest.mark.parametrize("name", shipped_shapes())
@pytest.mark.parametrize("ways", [2, 4, 8])
def test_ranks_together_hold_the_model_and_a_little_more(name: str, ways: int) -> None:
    scheme = as_it_is(load_shape(name))
    for layout in (Layout(ways), Layout(1, ways)):
        held = sum(stage_weights(scheme, layout)) * layout.tp
        assert scheme.weight_bytes <= held <= 1.25 * scheme.weight_bytes


@given(st.integers(1, 200), st.integers(1, 16))
def test_stages_take_all_layers_as_evenly_as_possible(layers: int, stages: int) -> None:
    if stages <= layers:
        sizes = stage_layers(layers, stages)
        assert sum(sizes) == layers
        assert max(sizes) - min(sizes) <= 1
        assert sizes[-1] == min(sizes)


@pytest.mark.slow
def test_stages_are_those_of_vllm() -> None:
    utils = pytest.importorskip("vllm.distributed.utils")
    for layers in range(1, 70):
        for stages in range(1, min(layers, 9)):
            theirs = [utils.get_pp_indices(layers, rank, stages) for rank in range(stages)]
            assert [end - start for start, end in theirs] == stage_layers(layers, stages)


LLAMA = load_shape("llama-3.1-8b")
HYBRIDS = {
    # Jamba's 28 layers of Mamba and 4 of attention; Falcon-H1's, every one of which is both.
    "jamba": replace(
        LLAMA, attention=(Attention(4),), state=State(28, 4, 8192, heads=8192, head=16)
    ),
    "falcon": replace(LLAMA, state=State(32, 4, 1536, 1, 256, 24, 64 * 256)),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["llama-4-scout", "gemma-3-27b", "llama-3.1-8b", "deepseek-v3", *HYBRIDS]
)
@pytest.mark.parametrize("context", [100, 8192, 40000])
def test_a_request_holds_as_many_bytes_as_vllm_reserves(name: str, context: int) -> None:
    """vLLM's grouping of layers and its bound on a request of the longest length."""
    utils = pytest.importorskip("vllm.v1.core.kv_cache_utils")
    shape, tokens = HYBRIDS[name] if name in HYBRIDS else load_shape(name), 8192
    layers_first = SimpleNamespace(is_block_outermost=False)
    config: Any = SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=context, hf_config=None),
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        parallel_config=SimpleNamespace(
            decode_context_parallel_size=1, prefill_context_parallel_size=1
        ),
        speculative_config=None,
        max_in_flight_tokens=tokens,
        kv_transfer_config=None,
        cache_config=SimpleNamespace(
            enable_prefix_caching=True,
            block_size=16,
            mamba_cache_mode="align",
            get_resolved_kv_cache_layout=lambda: layers_first,
        ),
        attention_config=SimpleNamespace(hisparse_config=None),
    )
    ours = cache_of(shape, Layout(), "gpu", 2, tokens)
    groups = utils.get_kv_cache_groups(config, _specs(shape, ours.block))
    layers = max(len(group.layer_names) for group in groups)
    page = groups[0].kv_cache_spec.page_size_bytes * layers
    theirs = sum(
        math.ceil(g.kv_cache_spec.max_memory_usage_bytes(config) / g.kv_cache_spec.page_size_bytes)
        for g in groups
    )
    assert ours.page_bytes == page
    assert ours.blocks(context) == theirs


def test_a_state_takes_as_much_of_a_long_request_as_of_a_short_one() -> None:
    shape = HYBRIDS["jamba"]
    cache = cache_of(shape, Layout(), "gpu", 2, 8192)
    assert cache.states == 2 * 28 // 4
    assert cache.block == 80  # 311,296 bytes of a state in pages of 4,096 a token
    assert cache.blocks(800) - cache.blocks(80) == 9
    # What vLLM 0.32 said of a tiny Falcon-H1 on a CPU with AVX512-BF16: blocks of 640 tokens.
    tiny = replace(LLAMA, layers=2, kv_heads=2, head_dim=32, value_dim=32)
    tiny = replace(tiny, attention=(Attention(2),), state=State(2, 4, 512, 1, 64, 8, 64 * 64))
    assert cache_of(tiny, Layout(), "cpu", 2, 2048).block == 640
    assert refusal(as_it_is(replace(shape, heads=96, kv_heads=96)), Layout(3)) == (
        "8192 heads of states are not divisible by 3"
    )


def _specs(shape: Any, block: int) -> dict[str, Any]:
    """vLLM's KV cache specs of a shape's layers, types mixed as in the model."""
    import torch
    from vllm.v1 import kv_cache_interface as vllm

    common: dict[str, Any] = {"block_size": block, "dtype": torch.bfloat16}
    heads = {**common, "num_kv_heads": shape.kv_heads, "head_size": shape.head_dim}
    if shape.latent:
        latent = vllm.MLAAttentionSpec(num_kv_heads=1, head_size=shape.latent, **common)
        return {f"layer.{i}": latent for i in range(shape.layers)}
    found = []
    for kind in shape.attention:
        if kind.window is None:
            spec = vllm.FullAttentionSpec(**heads)
        elif kind.chunked:
            spec = vllm.ChunkedLocalAttentionSpec(attention_chunk_size=kind.window, **heads)
        else:
            spec = vllm.SlidingWindowSpec(sliding_window=kind.window, **heads)
        found += [spec] * kind.layers
    if shape.state is not None:
        size = shape.state.rank_bytes(1)
        page = vllm.FullAttentionSpec(**heads).page_size_bytes
        assert page >= size > page - page // block * 16  # as few tokens as hold a state
        state = {"shapes": ((size // 2,),), "dtypes": (torch.bfloat16,), "block_size": block}
        spec = vllm.MambaSpec(**state, page_size_padded=page, mamba_cache_mode="align")
        found += [spec] * shape.state.layers
    return {f"layer.{i}": spec for i, spec in enumerate(found)}
