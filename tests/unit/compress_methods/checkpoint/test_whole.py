"""A compressed model that lacks layers or tensors, or whose scales are no numbers, is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from compress_methods import convert
from compress_methods.checkpoint.compressed import INDEX, open_compressed
from compress_methods.checkpoint.loading.model import require_finite_values, require_whole
from compress_methods.checkpoint.safetensors import read_tensors, write_tensors
from compress_methods.errors import CheckpointError
from compress_methods.formats import count_not_finite

RECIPE = {
    "formats": {"w": {"format": "integer", "bits": 4, "group_size": 128}},
    "modules": [{"match": "blocks", "format": "w", "algorithm": "rtn"}],
}


@pytest.fixture(scope="module")
def result(novels_8m: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("result")
    convert(novels_8m, RECIPE, out, quiet=True)
    return out


@pytest.fixture
def model(result: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(result, tmp_path / "model"))


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def leave_out(model: Path, part: str) -> list[str]:
    """Take tensors out of the index; names of those that went."""
    weight_map = json.loads((model / INDEX).read_text())["weight_map"]
    left = {name: file for name, file in weight_map.items() if part not in name}
    edit(model / INDEX, weight_map=left)
    return sorted(weight_map.keys() - left.keys())


@pytest.mark.parametrize("index", [0, 3, 7])
def test_an_index_without_a_layer_is_refused(index: int, model: Path) -> None:
    assert leave_out(model, f"layers.{index}.")
    with pytest.raises(CheckpointError, match=rf"no tensor of model.layers.{index} .* 8 layers"):
        open_compressed(model)


@pytest.mark.parametrize(("count", "first"), [(9, 8), (16, 8), (10**9, 8)])
def test_more_layers_than_the_files_hold_are_refused(count: int, first: int, model: Path) -> None:
    edit(model / "config.json", num_hidden_layers=count)
    with pytest.raises(CheckpointError, match=rf"no tensor of model.layers.{first}.* {count} lay"):
        open_compressed(model)


@pytest.mark.parametrize("part", ["layers.2.input_layernorm", "model.norm", "embed_tokens"])
def test_a_tensor_that_nothing_came_for_is_named(part: str, model: Path) -> None:
    (name,) = leave_out(model, part)
    with pytest.raises(CheckpointError, match=name.removeprefix("model.")):
        require_whole(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("part", ["3.mlp.up_proj.weight_scales", "3.input_layernorm.weight"])
def test_values_that_are_no_numbers_are_refused(part: str, value: float, model: Path) -> None:
    require_finite_values(open_compressed(model))
    file = next(model.glob("block-00003*.safetensors"))
    tensors = read_tensors(file)
    (name,) = (name for name in tensors if name.endswith(part))
    tensors[name].view(-1)[5] = value
    write_tensors(file, tensors)
    with pytest.raises(CheckpointError, match=rf"{part} has 1 values that are not finite"):
        require_finite_values(open_compressed(model))


def test_float8_is_looked_at_too() -> None:
    values = torch.tensor([1.0, float("nan"), 2.0])
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float64):
        assert count_not_finite(values.to(dtype)) == 1
    assert count_not_finite(torch.tensor([1, 2])) == 0
