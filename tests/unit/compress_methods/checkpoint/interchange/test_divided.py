"""Tensors that transformers divides by rows while it loads them are read as the parts they have."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from compress_methods.checkpoint.loading.model import load_model
from compress_methods.checkpoint.loading.tied import open_skeleton
from compress_methods.checkpoint.safetensors import read_tensors, write_tensors
from compress_methods.checkpoint.source import Source, open_source
from compress_methods.errors import CheckpointError
from tests.e2e.support.encoders import BERT, save_with_biases

KINDS = ("Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification")
TOKENS = torch.arange(5, 45)[None]


def make(kind: str, directory: Path) -> Any:
    torch.manual_seed(0)
    cls = getattr(transformers, kind)
    model = cls(cls.config_class(**{**BERT, "num_hidden_layers": 1})).eval()
    save_with_biases(model, directory)
    return model


def change(directory: Path, change: Callable[[str, Tensor], tuple[str, Tensor]]) -> None:
    path = directory / "model.safetensors"
    write_tensors(path, dict(change(name, t) for name, t in read_tensors(path).items()))


def opened(directory: Path, allow_pickle: bool = False) -> Source:
    skeleton = open_skeleton(directory, allow_pickle)
    return open_source(directory, skeleton, directory.name, allow_pickle)


@pytest.mark.parametrize(
    "kind", [f"{name}{kind}" for name in ("NomicBert", "Gte") for kind in KINDS]
)
def test_outputs_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    original = make(kind, tmp_path)
    with torch.no_grad():
        expected, found = original(TOKENS)[0], load_model(tmp_path)(TOKENS)[0]
    assert float((expected - found).abs().max()) < 1e-5


def test_parts_take_the_place_of_the_whole(tmp_path: Path) -> None:
    make("GteModel", tmp_path)
    stored = sum(t.nbytes for t in read_tensors(tmp_path / "model.safetensors").values())
    source = opened(tmp_path)
    assert source.nbytes == stored
    assert not [name for name in source.entries if "qkv_proj" in name or "up_gate" in name]
    whole = read_tensors(tmp_path / "model.safetensors")
    keys = whole["encoder.layer.0.attention.qkv_proj.weight"][128:256]
    gate = whole["encoder.layer.0.mlp.up_gate_proj.weight"][256:]
    assert torch.equal(source.read("layers.0.self_attn.k_proj.weight"), keys)
    first, rows = next(iter(source.slabs("layers.0.mlp.gate_proj.weight")))
    assert torch.equal(rows, gate[first : len(rows)])


def test_a_prefix_that_transformers_drops_may_stand_before_all_names(tmp_path: Path) -> None:
    original = make("GteModel", tmp_path)
    change(tmp_path, lambda name, tensor: (f"new.{name}", tensor))
    with torch.no_grad():
        assert torch.equal(original(TOKENS)[0], load_model(tmp_path)(TOKENS)[0])


def test_a_pickle_is_divided_too(tmp_path: Path) -> None:
    make("NomicBertModel", tmp_path)
    expected = opened(tmp_path).read("layers.0.self_attn.v_proj.weight")
    torch.save(read_tensors(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    found = opened(tmp_path, allow_pickle=True)
    assert torch.equal(found.read("layers.0.self_attn.v_proj.weight"), expected)


def test_rows_that_the_parts_cannot_share_are_refused(tmp_path: Path) -> None:
    make("NomicBertModel", tmp_path)
    change(tmp_path, lambda name, t: (name, t[:-1] if "Wqkv" in name else t))
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.q_proj\.weight is missing"):
        opened(tmp_path)


GPT2 = {
    "n_embd": 128, "n_layer": 1, "n_head": 4, "n_inner": 256, "layer_norm_epsilon": 1e-5,
    "max_trained_positions": 520, "n_positions": 8192, "rotary_emb_base": 500,
    "activation_function": "swiglu", "auto_map": {"AutoModel": "elsewhere--code.NomicBertModel"},
}  # fmt: skip
SAME = ("architectures", "model_type", "vocab_size", "type_vocab_size", "pad_token_id")


def in_other_words(directory: Path, **more: Any) -> None:
    """config.json as NomicBERT's authors write it."""
    path = directory / "config.json"
    held = json.loads(path.read_text())
    path.write_text(json.dumps({**{key: held[key] for key in SAME}, **GPT2, **more}))


def test_a_nomicbert_is_read_by_the_words_of_gpt2(tmp_path: Path) -> None:
    make("NomicBertModel", tmp_path)
    in_other_words(tmp_path)
    config = load_model(tmp_path).config
    assert (config.hidden_size, config.num_hidden_layers) == (128, 1)
    assert (config.num_attention_heads, config.intermediate_size) == (4, 256)
    assert (config.layer_norm_eps, config.max_position_embeddings) == (1e-5, 520)
    assert (config.hidden_act, config.rope_parameters["rope_theta"]) == ("silu", 500)


REFUSED = [
    ("activation_function", "gelu", "'gelu', expected 'swiglu'"),
    ("moe_every_n_layers", 2, "2, expected 0"),
    ("qkv_proj_bias", True, "True, expected False"),
    ("rotary_emb_fraction", 0.5, r"0.5, expected 1.0"),
]


@pytest.mark.parametrize(("key", "value", "says"), REFUSED)
def test_what_transformers_class_does_not_compute_is_refused(
    key: str, value: object, says: str, tmp_path: Path
) -> None:
    make("NomicBertModel", tmp_path)
    in_other_words(tmp_path, **{key: value})
    with pytest.raises(CheckpointError, match=f"{key} is {says}"):
        open_skeleton(tmp_path)
