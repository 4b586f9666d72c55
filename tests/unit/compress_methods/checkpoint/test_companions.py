"""What lies beside the weights comes out with them: folders, numbered tokenizers, and nothing
else; damaged, it is made again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compress_methods import convert
from compress_methods.checkpoint.companions import companion_files, companion_name
from compress_methods.checkpoint.integrity import find_damaged, read_report
from tests.e2e.support.encoders import make_encoder

RECIPE = {
    "formats": {"w4": {"format": "integer", "bits": 4, "group_size": 32}},
    "modules": [{"match": "blocks", "format": "w4"}],
    "calibration": {"held_out": 0},
}
COPIED = {
    "1_Pooling/config.json": '{"pooling_mode_mean_tokens": true}',
    "2_Dense/config.json": "{}",
    "2_Dense/model.safetensors": "weights",
    "additional_chat_templates/tool_use.jinja": "{{ messages }}",
    "tokenizer.model.v3": "pieces",
    "sentence_bert_config.json": "{}",
    "modules.json": json.dumps(
        [{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}, {"path": "../secret"}]
    ),
}
LEFT = ("onnx/model.onnx", "original/params.json", ".cache/x.json", "notes.md")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    model = make_encoder("bert", tmp_path / "model")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "config.json").write_text("{}")
    for name, text in {**COPIED, **dict.fromkeys(LEFT, "{}")}.items():
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text(text)
    return model


def test_folders_come_along(model: Path, tmp_path: Path) -> None:
    names = {companion_name(path, model) for path in companion_files(model)}
    assert names == {*COPIED, "tokenizer.json", "tokenizer_config.json"}
    out = tmp_path / "out"
    convert(model, RECIPE, out, quiet=True)
    assert {name: (out / name).read_text() for name in COPIED} == COPIED
    assert not any((out / name).exists() for name in LEFT)
    assert set(COPIED) < set(read_report(out)["files"])


def test_a_damaged_one_is_made_again(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(model, RECIPE, out, quiet=True)
    (out / "2_Dense" / "model.safetensors").write_text("other")
    (out / "1_Pooling" / "config.json").unlink()
    (out / "1_Pooling").rmdir()
    assert find_damaged(out) == ["1_Pooling/config.json", "2_Dense/model.safetensors"]
    convert(model, RECIPE, out, quiet=True)
    assert find_damaged(out) == []


def test_a_folders_file_is_part_of_the_source(model: Path, tmp_path: Path) -> None:
    from compress_methods.errors import OutputError

    convert(model, RECIPE, tmp_path / "out", quiet=True)
    (model / "2_Dense" / "model.safetensors").write_text("other")
    with pytest.raises(OutputError, match="another model"):
        convert(model, RECIPE, tmp_path / "out", quiet=True)
