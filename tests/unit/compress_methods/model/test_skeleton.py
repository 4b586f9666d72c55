"""What is found in a model: blocks, table, head, and every compressible matrix, experts among them.

A mixture of experts goes through conversion here, since its matrices are parts of parameters.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from compress_methods import convert
from compress_methods.checkpoint.compressed import open_compressed
from compress_methods.checkpoint.loading.model import load_model
from compress_methods.checkpoint.source import open_source
from compress_methods.errors import CheckpointError, RecipeError
from compress_methods.model.skeleton import build_skeleton
from tests.e2e.support.tiny import SMALL, make_model

EXPERTS, HIDDEN, INNER = 4, 128, 64
MOE: dict[str, Any] = {
    **SMALL,
    "vocab_size": 4096,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": INNER,
    "decoder_sparse_step": 1,
    "tie_word_embeddings": False,
}
INT8 = {"format": "integer", "bits": 8, "group_size": 32}


@pytest.fixture(scope="module")
def moe(novels_8m: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 with four experts in each of two layers, stored one by one."""
    folder = tmp_path_factory.mktemp("moe")
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(**MOE)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    for path in novels_8m.glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


def test_a_llama_is_its_blocks_its_table_its_head_and_seven_matrices_a_block(
    tmp_path: Path,
) -> None:
    skeleton = build_skeleton(make_model("Llama", tmp_path))
    assert (skeleton.blocks_name, len(skeleton.blocks)) == ("model.layers", 2)
    assert (skeleton.embedding, skeleton.head, skeleton.tied) == (
        "model.embed_tokens",
        "lm_head",
        {},
    )
    kinds = {name: slot.kind for name, slot in skeleton.slots.items()}
    assert kinds.pop("model.embed_tokens") == "embedding"
    assert kinds.pop("lm_head") == "lm_head"
    assert len(kinds) == 14
    assert set(kinds.values()) == {"blocks"}
    assert all(slot.is_plain for slot in skeleton.slots.values())
    assert {p.device.type for p in skeleton.model.parameters()} == {"meta"}


def test_a_tied_head_is_no_matrix_of_its_own_and_conv1d_lies_transposed(tmp_path: Path) -> None:
    skeleton = build_skeleton(make_model("GPT2", tmp_path))
    assert skeleton.tied == {"lm_head": "transformer.wte"}
    assert "lm_head" not in skeleton.slots
    slot = skeleton.slots["transformer.h.0.attn.c_attn"]
    assert (slot.rows, slot.cols, slot.transposed) == (384, 128, True)
    assert not skeleton.slots["transformer.wte"].transposed
    assert "lm_head.weight" not in skeleton.parameter_names()


def test_every_expert_is_a_matrix_and_the_router_is_none_unless_it_is_named(moe: Path) -> None:
    skeleton = build_skeleton(moe)
    slots = {n: s for n, s in skeleton.slots.items() if s.kind == "experts"}
    assert len(slots) == 2 * EXPERTS * 3
    up = slots["model.layers.1.mlp.experts.2.up_proj"]
    assert up.parameter == "model.layers.1.mlp.experts.gate_up_proj"
    assert (up.rows, up.cols, up.index) == (INNER, HIDDEN, (2, (INNER, 2 * INNER)))
    down = slots["model.layers.1.mlp.experts.2.down_proj"]
    assert (down.rows, down.cols, down.index) == (HIDDEN, INNER, (2,))
    assert all(s.kind != "blocks" for n, s in skeleton.slots.items() if n.endswith("mlp.gate"))


def test_experts_are_the_same_values_in_checkpoint_and_model(moe: Path) -> None:
    skeleton = build_skeleton(moe)
    source = open_source(moe, skeleton, "moe", False)
    reference = transformers.AutoModelForCausalLM.from_pretrained(moe, dtype=torch.float32)
    stored = load_file(moe / "model.safetensors")
    for name, slot in skeleton.slots.items():
        if slot.kind == "experts":
            found = source.read_slot(slot)
            assert torch.equal(found, slot.view(reference))
            assert torch.equal(found, stored[f"{name}.weight"])


def packing(match: str) -> dict[str, Any]:
    return {
        "formats": {"w": INT8},
        "modules": [{"match": match, "format": "w"}],
        "calibration": {"samples": 2, "length": 16, "held_out": 1},
    }


def test_compressed_experts_load_with_the_values_that_are_stored(
    moe: Path, some_text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    report = convert(moe, packing("experts"), out, calibration=some_text, quiet=True)
    matrices = open_compressed(out).matrices
    assert len(matrices) == 2 * EXPERTS * 3
    loaded, original = load_model(out), load_model(moe)
    slots = build_skeleton(moe).slots
    for name, matrix in matrices.items():
        assert torch.equal(slots[name].view(loaded), matrix.unpack())
        off = (slots[name].view(loaded) - slots[name].view(original)).abs().max()
        assert 0 < off < 0.01
    assert 0 < report["held_out"]["kl"] < 1e-3


def test_of_a_tensor_of_experts_all_go_or_none(moe: Path, tmp_path: Path) -> None:
    """Held one by one they may be kept singly; held in one tensor they may not."""
    some = packing(r"re:.*experts\.0\..*")
    some["calibration"]["held_out"] = 0
    convert(moe, some, tmp_path / "out", quiet=True)
    assert len(open_compressed(tmp_path / "out").matrices) == 2 * 3
    fused = tmp_path / "fused"
    fused.mkdir()
    (fused / "config.json").write_bytes((moe / "config.json").read_bytes())
    tensors = {n: t.contiguous() for n, t in load_model(moe).state_dict().items()}
    assert "model.layers.0.mlp.experts.gate_up_proj" in tensors
    save_file(tensors, fused / "model.safetensors")
    with pytest.raises(RecipeError, match=r"is kept, but .*experts\.0.* is packed"):
        convert(fused, some, tmp_path / "refused", quiet=True)
    everything = packing("experts")
    everything["calibration"]["held_out"] = 0
    convert(fused, everything, tmp_path / "whole", quiet=True)
    matrices = open_compressed(tmp_path / "whole").matrices
    assert len(matrices) == 2 * EXPERTS * 3
    name = "model.layers.0.mlp.experts.0.up_proj"
    apart = open_compressed(tmp_path / "out").matrices[name]
    assert torch.equal(matrices[name].unpack(), apart.unpack())


def test_more_layers_than_any_model_has_are_refused_at_once(
    novels_8m: Path, tmp_path: Path
) -> None:
    config = json.loads((novels_8m / "config.json").read_text())
    config |= {"num_hidden_layers": 10**9, "layer_types": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="num_hidden_layers is 1,000,000,000, expected at m"):
        build_skeleton(tmp_path)
