"""What is loaded into vLLM's layers is finite, and every layer of the model came."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from compress_methods.checkpoint.compressed import open_compressed
from compress_methods.errors import CheckpointError
from compress_methods.formats import format_from_dict
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
