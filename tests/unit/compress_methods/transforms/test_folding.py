"""Edges that factors move along: found in every family by one run of a block, and what is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compress_methods.transforms.folding.edge import difference, placed
from compress_methods.transforms.folding.edges import find_edges, pair
from compress_methods.transforms.folding.trace import Growth
from tests.e2e.support.tiny import make_model
from tests.e2e.support.zoo import UNTIED, ZOO
from tests.unit.compress_methods.transforms.blocks import open_block

LLAMA = {
    "input_layernorm -> q_proj, k_proj, v_proj",
    "self_attn.v_proj -> o_proj",
    "post_attention_layernorm -> gate_proj, up_proj",
    "mlp.up_proj -> down_proj",
}
GEMMA = {name.replace("post_attention", "pre_feedforward") for name in LLAMA}
EDGES: dict[str, set[str]] = {
    "llama": LLAMA,
    "llama-bias": LLAMA,
    "llama-odd-head": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma": LLAMA,
    "gemma2": GEMMA,
    "gemma3": GEMMA,
    "phi3": {
        "input_layernorm -> qkv_proj",
        "self_attn.qkv_proj -> o_proj",
        "post_attention_layernorm -> gate_up_proj",
        "mlp.gate_up_proj -> down_proj",
    },
    "gpt2": {"ln_1 -> c_attn", "attn.c_attn -> c_proj", "ln_2 -> c_fc"},
    "opt": {
        "self_attn_layer_norm -> q_proj, k_proj, v_proj",
        "self_attn.v_proj -> out_proj",
        "final_layer_norm -> fc1",
        "fc1 -> fc2",
    },
    "phi": {"input_layernorm -> q_proj, k_proj, v_proj, fc1", "self_attn.v_proj -> dense"},
    "falcon-new": {
        "ln_attn -> query_key_value",
        "self_attention.query_key_value -> dense",
        "ln_mlp -> dense_h_to_4h",
    },
    "falcon-old": {
        "input_layernorm -> query_key_value, dense_h_to_4h",
        "self_attention.query_key_value -> dense",
    },
    "bloom": {
        "input_layernorm -> query_key_value",
        "self_attention.query_key_value -> dense",
        "post_attention_layernorm -> dense_h_to_4h",
    },
    "olmo2": {"self_attn.v_proj -> o_proj", "mlp.up_proj -> down_proj"},
}
"""By family; OLMo 2 has norms behind its layers, GELU lets nothing through."""


@pytest.mark.parametrize("name", list(EDGES))
def test_edges_of_a_family(name: str, tmp_path: Path) -> None:
    kind, config = ZOO[name]
    part, states = open_block(make_model(kind, tmp_path, **config))
    found = find_edges(part, states)
    assert {edge.name.removeprefix(f"{part.prefix}.") for edge in found} == EDGES[name]
    expected = part.forward(states)
    draw = torch.Generator().manual_seed(3)
    for edge in found:
        factors = torch.rand(edge.writer.channels, generator=draw) * 4 + 0.1
        with placed(part, edge.folded(part, factors)):
            assert difference(part, states, expected) < 1e-4
        with placed(part, edge.folded(part, factors)):
            for slot in edge.readers:
                part.weight(slot)[:, 0] *= 1.5
            assert difference(part, states, expected) > 1e-4
    assert difference(part, states, expected) == 0


def test_heads_that_share_values_share_factors(tmp_path: Path) -> None:
    part, states = open_block(make_model("Llama", tmp_path))
    edge = next(e for e in find_edges(part, states) if "v_proj ->" in e.name)
    heads = edge.channel.unflatten(0, (4, 32))  # four query heads on two KV heads
    assert edge.writer.channels == 64
    assert torch.equal(heads[0], torch.arange(32))
    assert torch.equal(heads[0], heads[1])
    assert torch.equal(heads[2], torch.arange(32, 64))
    assert torch.equal(heads[2], heads[3])


@pytest.mark.parametrize("kind", ["Qwen2Moe", "Qwen3Moe"])
def test_experts_and_router_take_the_factors_of_their_norm_together(
    kind: str, tmp_path: Path
) -> None:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    config = {**UNTIED, **experts, "shared_expert_intermediate_size": 64}
    part, states = open_block(make_model(kind, tmp_path, **config))
    found = {edge.name.removeprefix(f"{part.prefix}."): edge for edge in find_edges(part, states)}
    assert "self_attn.v_proj -> o_proj" in found
    edge = next(e for name, e in found.items() if name.startswith("post_attention_layernorm"))
    expected = part.forward(states)
    with placed(part, edge.folded(part, torch.rand(128) + 0.5)):
        assert difference(part, states, expected) < 1e-4
    assert len([slot for slot in edge.readers if slot.index]) == 8  # gate and up of four experts
    assert any("gate" in name or "router" in name for name in edge.others)


def test_a_layer_that_clips_its_outputs_is_no_writer(tmp_path: Path) -> None:
    kind, config = ZOO["olmo"]
    part, states = open_block(make_model(kind, tmp_path, **{**config, "clip_qkv": 1.0}))
    assert not [edge for edge in find_edges(part, states) if "v_proj ->" in edge.name]


def test_channels_that_no_token_moves_are_paired_as_their_neighbours() -> None:
    draw = torch.Generator().manual_seed(0)
    columns = torch.randn(4, 64, generator=draw).double()
    columns[:, 10:13] = 0
    rows = torch.randn(4, 192, generator=draw).double()
    rows[:, 100:164] = columns
    rows[:, 40:44] = 0
    found = pair(Growth(rows, rows.abs().amax(0)), Growth(columns, columns.abs().amax(0)))
    assert found is not None
    assert torch.equal(found[0], torch.arange(100, 164))
    rows[:, 120] += 1
    assert pair(Growth(rows, rows.abs().amax(0)), Growth(columns, columns.abs().amax(0))) is None
