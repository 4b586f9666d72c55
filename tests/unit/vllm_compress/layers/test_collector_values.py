"""What is loaded into vLLM's layers is finite, and every layer of the model came."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from compress_methods.checkpoint.compressed import open_compressed
from compress_methods.errors import CheckpointError
from compress_methods.formats import format_from_dict
from compress_methods.formats.integer import Integer
from vllm_compress.layers import collector
from vllm_compress.targets import Target, find_targets


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scales_that_are_no_numbers_are_not_served(value: float) -> None:
    fmt = format_from_dict({"format": "integer", "bits": 4, "group_size": 32, "symmetric": True})
    tensors = fmt.pack(fmt.nearest(torch.randn(8, 64)))
    target = Target("model.layers.0.up", (8, 64), fmt)
    collector.check(target, tensors)
    tensors["weight_scales"].view(-1)[3] = value
    with pytest.raises(CheckpointError, match=r"0.up.weight_scales has 1 values that are not fini"):
        collector.check(target, tensors)


def test_a_model_with_a_norm_less_than_its_config_is_not_served(
    novels_8m: Path, tmp_path: Path
) -> None:
    from compress_methods import convert

    recipe = {
        "formats": {"w": {"format": "integer", "bits": 8, "group_size": 128}},
        "modules": [{"match": "re:.*o_proj", "format": "w"}],
    }
    convert(novels_8m, recipe, tmp_path / "whole", quiet=True)
    spec = open_compressed(tmp_path / "whole").spec
    assert len(find_targets(spec, str(tmp_path / "whole"), None)) == 8
    model = Path(shutil.copytree(tmp_path / "whole", tmp_path / "part"))
    index = model / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    del weight_map["model.layers.4.post_attention_layernorm.weight"]
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=r"layers.4.post_attention_layernorm.weight"):
        find_targets(spec, str(model), None)


@pytest.mark.parametrize("way", ["runai_streamer", "fastsafetensors"])
def test_a_buffer_that_is_used_again_is_copied(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collector, "load_format", lambda: way)
    fmt = Integer(bits=4, group_size=32)
    stored = fmt.pack(fmt.nearest(torch.randn(8, 32)))
    mine, layer = collector.Collector([Target("up", (8, 32), fmt)]), torch.nn.Module()
    mine.attach(layer)
    buffers = {name: tensor.clone() for name, tensor in stored.items()}
    for name, buffer in buffers.items():
        parameter: Any = getattr(layer, name)
        parameter.weight_loader(parameter, buffer)
        buffer.zero_()
    assert all(torch.equal(mine.found[None][name], stored[name]) for name in stored)


@pytest.mark.parametrize("way", ["sharded_state", "tensorizer"])
def test_what_a_server_has_prepared_is_refused(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collector, "load_format", lambda: way)
    with pytest.raises(CheckpointError, match=f"--load-format {way} loads what a server"):
        collector.Collector([Target("up", (8, 32), Integer(bits=4, group_size=32))])


def test_what_was_prepared_is_let_go_and_may_come_again() -> None:
    fmt = Integer(bits=4, group_size=32)
    stored = fmt.pack(fmt.nearest(torch.randn(8, 32)))
    mine = collector.Collector([Target("up", (8, 32), fmt)])
    assert mine.is_waiting
    mine.found = {None: stored}
    mine.close()
    assert not mine.is_waiting
    assert not mine.found
    mine.found = {None: stored}
    assert mine.is_waiting
