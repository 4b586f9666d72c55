"""GGUF files open as models: configuration, names, tokenizer; what is damaged is one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from compress_methods.checkpoint.compressed import read_json
from compress_methods.checkpoint.interchange.gguf.container import parts_of, read_gguf
from compress_methods.checkpoint.interchange.gguf.unfold import find_gguf, llama3_factors
from compress_methods.checkpoint.source import resolve_model
from compress_methods.errors import CheckpointError

FILE = Path(__file__).parents[4] / "assets" / "interchange" / "gguf-q4_0" / "model.Q4_0.gguf"


def test_header_and_table_are_read_without_the_package() -> None:
    facts, tensors = read_gguf(FILE)
    assert facts["general.architecture"] == "llama"
    assert facts["tokenizer.ggml.tokens"] == 64
    found = tensors["blk.0.ffn_up.weight"]
    assert (found.kind, found.shape) == (2, (256, 128))
    assert found.start % 32 == 0


@pytest.mark.parametrize("size", [3, 20, 200, 1000])
def test_a_file_that_is_cut_off_is_one_line(size: int, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(FILE.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"cut\.gguf: (not a GGUF|damaged or cut)") as caught:
        read_gguf(cut)
    assert "\n" not in str(caught.value)


def test_parts_of_a_split_model_belong_together(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / f"m-0000{number}-of-00003.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"m-00003-of-00003\.gguf: no such file"):
        parts_of(tmp_path / "m-00001-of-00003.gguf")
    (tmp_path / "m-00003-of-00003.gguf").write_bytes(b"GGUF")
    assert find_gguf(tmp_path) == tmp_path / "m-00001-of-00003.gguf"
    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="has 2 GGUF models"):
        find_gguf(tmp_path)


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    changed = tmp_path / "m.gguf"
    changed.write_bytes(
        FILE.read_bytes().replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0lamma")
    )
    with pytest.raises(CheckpointError, match=r"general\.architecture is 'lamma', expected one of"):
        resolve_model(changed)


def test_a_directory_opens_with_the_configuration_beside_it(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    made = resolve_model(FILE)
    config = read_json(made / "config.json")
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["hidden_size"], config["num_key_value_heads"]) == (128, 2)
    assert (made / "tokenizer.json").is_file()
    shutil.copyfile(FILE, tmp_path / FILE.name)
    assert (resolve_model(tmp_path) / "tokenizer.json").is_file()
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    (tmp_path / "config.json").write_text(json.dumps({**plain, "rms_norm_eps": 0.25}))
    assert read_json(resolve_model(tmp_path) / "config.json")["rms_norm_eps"] == 0.25


def test_rotary_factors_are_those_of_transformers() -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    scaling = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_theta": 500000.0,
    }  # fmt: skip
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "head_dim": 64}
    plain = LlamaConfig(**sizes, rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
    scaled = LlamaConfig(**sizes, rope_parameters=scaling)
    factors = LlamaRotaryEmbedding(plain).inv_freq / LlamaRotaryEmbedding(scaled).inv_freq
    assert torch.allclose(factors, llama3_factors(32, 500000.0, 8.0), rtol=1e-4)
