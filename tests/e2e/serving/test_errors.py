"""What a user reads when a checkpoint cannot be served: one line that says what is wrong and where,
before any worker starts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.e2e.support.engine import Engine
from tests.e2e.support.tiny import compress, make_model

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

PROMPT = [[5, 6, 7]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed Llama of two layers."""
    directory = tmp_path_factory.mktemp("errors")
    formats = {"w4": {"format": "integer", "bits": 4, "group_size": 32}}
    return compress(
        make_model("Llama", directory / "model"), directory / "packed", formats, {"blocks": "w4"}
    )


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"].update(changes)
    path.write_text(json.dumps(config))


def break_it(directory: Path, how: str) -> None:
    if how == "unfinished":
        (directory / ".incomplete").touch()
    elif how == "newer":
        edit_config(directory, version=2)
    elif how == "unknown key":
        edit_config(directory, formts={})
    elif how == "truncated":
        shard = directory / "block-00001.safetensors"
        shard.write_bytes(shard.read_bytes()[:-100])
    elif how == "tensor missing":
        index = directory / "model.safetensors.index.json"
        text = json.loads(index.read_text())
        del text["weight_map"]["model.layers.1.self_attn.k_proj.weight_scales"]
        index.write_text(json.dumps(text))
    elif how == "kernel":
        pass


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("unfinished", "conversion is not finished"),
        ("newer", "version is 2, this vllm-compress reads up to 1; upgrade it"),
        ("unknown key", "unknown key 'formts'; did you mean 'formats'?"),
        ("truncated", "block-00001.safetensors"),
        ("tensor missing", "model.layers.1.self_attn.k_proj.weight_scales is missing"),
        ("kernel", "VLLM_COMPRESS_KERNEL is 'fastest', expected vllm or one of"),
    ],
)
def test_broken_checkpoint(
    engine: Engine, tiny: Path, tmp_path: Path, how: str, expected: str
) -> None:
    copy = shutil.copytree(tiny, tmp_path / "copy")
    break_it(copy, how)
    kernel = {"VLLM_COMPRESS_KERNEL": "fastest"} if how == "kernel" else {}
    error = engine.run(copy, PROMPT, dtype="float32", env=kernel).error
    assert expected in error
    assert "\n" not in error


def test_embedding_that_the_model_class_cannot_take(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made by a conversion that knew less than ours, which refuses it."""
    monkeypatch.setattr(
        "compress_methods.conversion.planning.fit.why_not_served", lambda *args: None
    )
    packed = compress(
        make_model("OPT", tmp_path / "model"),
        tmp_path / "packed",
        {"w8": {"format": "integer", "bits": 8, "group_size": -1}},
        {"embedding": "w8"},
    )
    error = engine.run(packed, PROMPT, dtype="float32").error
    assert "vLLM's OPTForCausalLM cannot take it so; convert again with" in error


def test_a_good_checkpoint_is_served_after_all_this(engine: Engine, tiny: Path) -> None:
    assert engine.run(tiny, PROMPT, dtype="float32", tokens=2).error == ""
