"""Opening compressed checkpoints, whole and damaged; safetensors files as the library has them."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress_methods import convert
from compress_methods.checkpoint.compressed import INDEX, open_compressed
from compress_methods.checkpoint.quantization_config import parse
from compress_methods.checkpoint.safetensors import Writer, read_header, read_tensors, write_tensors
from compress_methods.errors import CheckpointError
from compress_methods.formats import TensorSpec

RECIPE = {
    "formats": {"w": {"format": "integer", "bits": 3, "group_size": 64, "symmetric": False}},
    "modules": [{"match": "blocks", "format": "w"}],
}
NAME = "model.layers.2.mlp.up_proj"


@pytest.fixture(scope="module")
def whole(novels_8m: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compressed") / "out"
    convert(novels_8m, RECIPE, out, quiet=True)
    return out


@pytest.fixture
def directory(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def replace_tensor(directory: Path, name: str, make: Callable[[torch.Tensor], Any]) -> None:
    path = directory / "block-00002.safetensors"
    tensors = read_tensors(path)
    changed = make(tensors.pop(name))
    write_tensors(path, tensors if changed is None else {**tensors, name: changed})


def test_rules_name_each_kind_of_matrix_once_with_its_shape(whole: Path) -> None:
    block = json.loads((whole / "config.json").read_text())["quantization_config"]
    assert len(block["modules"]) == 7
    assert all(rule["match"].startswith("re:") for rule in block["modules"])
    checkpoint = open_compressed(whole)
    assert (checkpoint.matrices[NAME].rows, checkpoint.matrices[NAME].cols) == (768, 256)
    assert parse(block).to_dict() == block


DAMAGE: list[tuple[str, Callable[[Path], None], list[str]]] = [
    (
        "tensor missing from its file",
        lambda d: replace_tensor(d, f"{NAME}.weight_scales", lambda t: None),
        ["block-00002.safetensors", f"{NAME}.weight_scales is missing"],
    ),
    (
        "too many rows",
        lambda d: replace_tensor(d, f"{NAME}.weight_packed", lambda t: torch.cat([t, t])),
        [f"{NAME}.weight_packed is [1536, 96]", "expected [768, 96]"],
    ),
    (
        "other dtype",
        lambda d: replace_tensor(d, f"{NAME}.weight_scales", lambda t: t.float()),
        [f"{NAME}.weight_scales is", " float32", "expected", " bfloat16"],
    ),
    (
        "absent shard",
        lambda d: (d / "block-00005.safetensors").unlink(),
        [INDEX, "names block-00005.safetensors, which is not there"],
    ),
    (
        "truncated",
        lambda d: (d / "block-00005.safetensors").write_bytes(b"\x10\x00"),
        ["block-00005.safetensors", "not a safetensors file"],
    ),
    (
        "newer version",
        lambda d: edit(d / "config.json", lambda c: c["quantization_config"].update(version=7)),
        ["config.json", "version is 7", "upgrade"],
    ),
    (
        "no config block",
        lambda d: edit(d / "config.json", lambda c: c.pop("quantization_config")),
        ["config.json", "no quantization_config"],
    ),
    (
        "unfinished",
        lambda d: (d / ".incomplete").touch(),
        ["not finished", "same convert command"],
    ),
    (
        "kept tensor missing",
        lambda d: replace_tensor(d, "model.layers.2.input_layernorm.weight", lambda t: None),
        ["model.layers.2.input_layernorm.weight is missing"],
    ),
]


@pytest.mark.parametrize(("damage", "words"), [c[1:] for c in DAMAGE], ids=[c[0] for c in DAMAGE])
def test_damage_is_one_line_that_names_it(
    damage: Callable[[Path], None], words: list[str], directory: Path
) -> None:
    damage(directory)
    with pytest.raises(CheckpointError) as caught:
        open_compressed(directory)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


GOOD = {
    "quant_method": "vllm_compress",
    "version": 1,
    "formats": {"w": {"format": "integer"}},
    "modules": [{"match": "a", "format": "w", "shape": [8, 128]}],
}
MALFORMED: list[tuple[dict[str, Any], str]] = [
    ({"quant_method": "gptq"}, "quant_method is 'gptq'"),
    ({"version": "1"}, "version is '1'"),
    ({"version": 0}, "version is 0"),
    ({"formats": []}, "formats is \\[\\]"),
    ({"formats": {"w": {"format": "integer", "bits": 7}}}, r"formats\.w: .*bits is 7"),
    ({"modules": {}}, "modules is {}"),
    ({"modules": [{"match": 3, "format": "w"}]}, r"modules\[0\]"),
    ({"modules": [{"match": "a", "format": "v"}]}, r"unknown format 'v'"),
    ({"modules": [{"match": "re:(", "format": "w"}]}, r"modules\[0\]: match 're:\('"),
    ({"modules": [{"match": "a", "format": "w", "shape": [1]}]}, "shape is \\[1\\]"),
    ({"tied": ["lm_head"]}, "tied is"),
    ({"embedding": 3}, "embedding is 3"),
    ({"surprise": 1}, "unknown key 'surprise'"),
]


@pytest.mark.parametrize(("change", "message"), MALFORMED)
def test_a_malformed_block_names_the_key(change: dict[str, Any], message: str) -> None:
    parse(copy.deepcopy(GOOD))
    with pytest.raises(CheckpointError, match=message):
        parse({**GOOD, **change})


def test_files_are_the_librarys_files(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 5).bfloat16(),
        "b": torch.randint(0, 255, (7,), dtype=torch.uint8),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(2.5),
    }
    write_tensors(tmp_path / "ours", tensors)
    save_file(tensors, tmp_path / "theirs")
    for found in (load_file(tmp_path / "ours"), read_tensors(tmp_path / "theirs")):
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_slabs_are_the_tensor_in_pieces(tmp_path: Path) -> None:
    tensor = torch.randn(100, 16)
    write_tensors(tmp_path / "file", {"t": tensor})
    slabs = list(read_header(tmp_path / "file")["t"].slabs(multiple=8, limit=1000))
    assert all(first % 8 == 0 and len(slab) <= 16 for first, slab in slabs)
    assert torch.equal(torch.cat([slab for _, slab in slabs]), tensor)


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    spec = {"t": TensorSpec((4,), "float32")}
    with pytest.raises(ValueError, match="not written whole"), Writer(tmp_path / "f", spec):
        pass
    with pytest.raises(ValueError, match="out of order"), Writer(tmp_path / "f", spec) as writer:
        writer.put("t", torch.zeros(5))
    assert not list(tmp_path.iterdir())
