"""Results as GGUF files: the same numbers, by the package of llama.cpp and by our own reader."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compress_methods import convert, load_model
from compress_methods.checkpoint.interchange.gguf.blocks import KINDS
from compress_methods.checkpoint.interchange.gguf.equals import blocks_of, equal_of
from compress_methods.checkpoint.interchange.gguf.unfold import llama3_factors
from compress_methods.checkpoint.loading.tied import open_skeleton
from compress_methods.checkpoint.source import open_source, resolve_model
from compress_methods.conversion.exchange.exporting import write_gguf
from compress_methods.errors import CompressError, FormatError
from compress_methods.formats import Stored, format_from_dict
from tests.e2e.support.tiny import make_model

gguf = pytest.importorskip("gguf")
INT4 = {"format": "integer", "bits": 4, "group_size": 128}
EQUAL: dict[str, tuple[dict[str, Any], str]] = {
    "int4 g128": (INT4, "Q4_0"),
    "int4 g32, float16": ({**INT4, "group_size": 32, "scale_dtype": "float16"}, "Q4_0"),
    "int4 asymmetric": ({**INT4, "group_size": 64, "symmetric": False}, "Q5_0"),
    "int4 between": ({**INT4, "levels": "mid"}, "Q5_0"),
    "int3": ({**INT4, "bits": 3}, "Q4_0"),
    "int3 asymmetric": ({**INT4, "bits": 3, "symmetric": False}, "Q4_0"),
    "int2 between": ({**INT4, "bits": 2, "levels": "mid"}, "Q4_0"),
    "int5": ({**INT4, "bits": 5}, "Q5_0"),
    "int6 of rows": ({**INT4, "bits": 6, "group_size": -1}, "Q8_0"),
    "int8 of rows": ({**INT4, "bits": 8, "group_size": -1}, "Q8_0"),
    "mxfp4": ({"format": "float", "kind": "mxfp4"}, "MXFP4"),
}


def recipe(fmt: dict[str, Any], match: Any = "blocks") -> dict[str, Any]:
    rules = [{"match": match, "format": "w"}]
    return {"formats": {"w": fmt}, "modules": rules, "calibration": {"held_out": 0}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Grouped heads, biases everywhere, rotary embeddings scaled as Llama 3.1's."""
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 8192, "rope_theta": 500000.0}
    more = {"attention_bias": True, "mlp_bias": True, "max_position_embeddings": 131072}
    return make_model("Llama", tmp_path_factory.mktemp("model") / "m", rope_parameters=rope, **more)


@pytest.mark.parametrize("case", list(EQUAL))
def test_blocks_have_the_bits_of_our_values(case: str) -> None:
    settings, wanted = EQUAL[case]
    fmt = format_from_dict(settings)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(16, 256, generator=generator)
    stored = Stored.whole(fmt, fmt.pack(fmt.nearest(weight)), (16, 256))
    number, data = equal_of("m", fmt), blocks_of("m", stored)
    assert KINDS[number].name == wanted
    theirs = gguf.dequantize(data.numpy(), gguf.GGMLQuantizationType(number))
    assert np.array_equal(theirs, stored.values().numpy())


def test_a_scale_that_is_no_float16_is_refused() -> None:
    fmt = format_from_dict({**INT4, "scale_dtype": "float32"})
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(1))
    stored = Stored.whole(fmt, fmt.pack(fmt.nearest(weight)), (16, 256))
    with pytest.raises(FormatError, match="m: scales are not float16; give scale_dtype: float16"):
        blocks_of("m", stored)


def parameters_of(path: Path) -> dict[str, torch.Tensor]:
    directory = resolve_model(path)
    source = open_source(directory, open_skeleton(directory), "m", allow_pickle=False)
    return {name: source.read_float(name) for name in source.names}


def test_the_file_holds_what_the_result_holds(model: Path, tmp_path: Path) -> None:
    convert(model, recipe(INT4), tmp_path / "o", layout="gguf", quiet=True)
    beside = tmp_path / "beside"  # transformers takes no biases of Llama from the file alone
    beside.mkdir()
    shutil.copy(tmp_path / "o" / "o.gguf", beside)
    shutil.copy(model / "config.json", beside)
    wanted, found = dict(load_model(tmp_path / "o").named_parameters()), parameters_of(beside)
    assert found.keys() == wanted.keys()
    assert "model.layers.0.self_attn.k_proj.bias" in wanted
    for name, values in wanted.items():
        assert torch.equal(found[name], values), name
    reader = gguf.GGUFReader(beside / "o.gguf")
    assert reader.get_field("llama.rope.freq_base").contents() == 500000.0
    (factors,) = (t.data for t in reader.tensors if t.name == "rope_freqs.weight")
    assert np.allclose(factors, llama3_factors(16, 500000.0, 8.0).numpy())


def test_a_tied_model_opens_from_the_file_alone(tmp_path: Path) -> None:
    made = make_model("Qwen3", tmp_path / "m", tie_word_embeddings=True)
    convert(made, recipe(INT4, ["blocks", "embedding"]), tmp_path / "o", layout="gguf", quiet=True)
    wanted = dict(load_model(tmp_path / "o").named_parameters())
    found = parameters_of(tmp_path / "o" / "o.gguf")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], values) for name, values in wanted.items())
    config = json.loads((tmp_path / "o" / "config.json").read_text())
    theirs = json.loads((resolve_model(tmp_path / "o" / "o.gguf") / "config.json").read_text())
    for key in ("num_key_value_heads", "head_dim", "max_position_embeddings", "hidden_size"):
        assert theirs[key] == config[key], key


def test_the_tokenizer_cuts_text_as_the_original_does(
    novels_8m: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer

    folder = make_model("Llama", tmp_path / "m", vocab_size=4096)
    for path in novels_8m.glob("tokenizer*"):
        shutil.copy(path, folder)
    convert(folder, recipe(INT4), tmp_path / "o", layout="gguf", quiet=True)
    text = "It isn't so, said 3 of them:\n\n  nought — naïve!"
    theirs = AutoTokenizer.from_pretrained(tmp_path / "o", gguf_file="o.gguf")
    assert theirs(text)["input_ids"] == AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    assert "the file gets none" not in capfd.readouterr().err
    block = json.loads((folder / "tokenizer.json").read_text())
    block["pre_tokenizer"] = {"type": "Whitespace"}
    (folder / "tokenizer.json").write_text(json.dumps(block))
    convert(folder, recipe(INT4), tmp_path / "other", layout="gguf", quiet=True)
    assert "the file gets none" in capfd.readouterr().err
    reader = gguf.GGUFReader(tmp_path / "other" / "other.gguf")
    assert reader.get_field("tokenizer.ggml.model").contents() == "none"
    assert reader.get_field("tokenizer.ggml.tokens") is None


def test_a_full_disk_is_one_line_and_leaves_no_part(
    novels_8m: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    convert(novels_8m, recipe(INT4), tmp_path / "o", quiet=True)
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(CompressError, match="No space left on device; all else of") as caught:
        write_gguf(tmp_path / "o")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "o").glob("*.gguf*"))


@pytest.mark.parametrize(
    ("kind", "changes", "fmt", "words"),
    [
        ("Llama", {}, {**INT4, "bits": 8, "symmetric": False}, "int8.* has no equal in gguf"),
        ("Llama", {}, {"format": "lookup", "bits": 4}, "has no equal in gguf"),
        ("Llama", {"hidden_act": "gelu"}, INT4, "hidden_act is 'gelu', expected 'silu'"),
        (
            "Llama",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            INT4,
            "rope_scaling .* has no equal in GGUF",
        ),
        ("GPT2", {}, INT4, "model_type is 'gpt2', of which no GGUF is written"),
    ],
)
def test_what_has_no_equal_is_refused_before_any_work(
    kind: str, changes: dict[str, Any], fmt: dict[str, Any], words: str, tmp_path: Path
) -> None:
    made = make_model(kind, tmp_path / "m", **changes)
    with pytest.raises(CompressError, match=words) as caught:
        convert(made, recipe(fmt), tmp_path / "o", layout="gguf", quiet=True)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "o").exists()
