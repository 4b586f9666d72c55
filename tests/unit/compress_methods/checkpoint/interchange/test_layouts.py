"""Compressed checkpoints as sources: our own layout, and what no layout knows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compress_methods import convert
from compress_methods.checkpoint.compressed import INDEX, open_compressed, read_entries
from compress_methods.checkpoint.interchange import LAYOUTS, DecodedEntry
from compress_methods.checkpoint.interchange.own import OWN, OwnLayout
from compress_methods.checkpoint.loading.model import load_model
from compress_methods.checkpoint.safetensors import read_header, read_tensors, write_tensors
from compress_methods.checkpoint.source import Source, open_source
from compress_methods.errors import CheckpointError
from compress_methods.formats import Stored
from compress_methods.formats.dense import Dense
from compress_methods.formats.integer import Integer
from compress_methods.formats.sparse import Sparse
from compress_methods.model.skeleton import build_skeleton
from tests.e2e.support.tiny import compress, make_model

HALF = {"format": "sparse", "n": 64, "m": 128, "values": {"format": "dense"}}
RECIPE: dict[str, Any] = {
    "formats": {
        "w": {"format": "integer", "bits": 3, "group_size": 64, "symmetric": False},
        "half": HALF,
        "table": {"format": "integer", "bits": 8, "group_size": -1},
    },
    "modules": [
        {"match": r"re:.*_proj", "format": "w"},
        {"match": "embedding", "format": "table"},
    ],
    "calibration": {"held_out": 0},
}
NAME = "model.layers.2.mlp.down_proj"


@pytest.fixture(scope="module")
def packed(novels_8m: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("own") / "out"
    recipe = {**RECIPE, "modules": [{"match": f"re:{NAME}", "format": "half"}, *RECIPE["modules"]]}
    convert(novels_8m, recipe, out, quiet=True)
    return out


def opened(folder: Path) -> Source:
    return open_source(folder, build_skeleton(folder), folder.name, False)


def test_our_own_checkpoint_opens_as_the_model_whose_values_it_stores(
    packed: Path, novels_8m: Path
) -> None:
    source, original = opened(packed), opened(novels_8m)
    checkpoint = open_compressed(packed)
    assert len(checkpoint.matrices) == 57
    assert source.names.keys() == original.names.keys()
    for module, matrix in checkpoint.matrices.items():
        entry = source.entry(f"{module}.weight")
        assert isinstance(entry, DecodedEntry)
        assert (entry.shape, entry.dtype) == ((matrix.rows, matrix.cols), "float32")
        assert entry.nbytes == 4 * matrix.rows * matrix.cols
        assert torch.equal(source.read(f"{module}.weight"), matrix.unpack())
    for name in set(original.names) - {f"{module}.weight" for module in checkpoint.matrices}:
        assert torch.equal(source.read(name), original.read(name))
    left = [name for name in source.entries if name.rpartition(".")[2] not in ("weight", "bias")]
    assert left == []


def test_a_decoded_matrix_is_read_in_pieces_like_any_other(packed: Path) -> None:
    source, matrix = opened(packed), open_compressed(packed).matrices[NAME]
    values = matrix.unpack()
    slot = build_skeleton(packed).slots[NAME]
    assert torch.equal(source.read_slot(slot), values)
    slabs = list(source.entry(f"{NAME}.weight").slabs(multiple=8, limit=2**16))
    assert len(slabs) > 2
    assert torch.equal(torch.cat([slab for _, slab in slabs]), values)
    assert torch.equal(source.entry(f"{NAME}.weight").read(100, 3), values[100:103])
    halved = torch.empty(matrix.rows, matrix.cols, dtype=torch.bfloat16)
    source.entry(f"{NAME}.weight").copy_to(halved)
    assert torch.equal(halved, values.bfloat16())


def test_what_was_packed_is_packed_again_without_loss(packed: Path, tmp_path: Path) -> None:
    recipe = {**RECIPE, "modules": [{"match": f"re:{NAME}", "format": "half"}]}
    convert(packed, recipe, tmp_path / "again", quiet=True)
    first, second = open_compressed(packed), open_compressed(tmp_path / "again")
    assert list(second.matrices) == [NAME]
    assert torch.equal(second.matrices[NAME].unpack(), first.matrices[NAME].unpack())
    other = "model.layers.0.self_attn.q_proj"
    kept = second.dense[f"{other}.weight"]
    assert kept.dtype == "float32"
    assert torch.equal(kept.read(), first.matrices[other].unpack())


def test_a_tied_head_is_the_table_that_is_stored(tmp_path: Path) -> None:
    model = make_model("Qwen2", tmp_path / "model")
    compress(model, tmp_path / "out", {"t": RECIPE["formats"]["table"]}, {"embedding": "t"})
    source = opened(tmp_path / "out")
    values = open_compressed(tmp_path / "out").matrices["model.embed_tokens"].unpack()
    assert torch.equal(source.read("model.embed_tokens.weight"), values)
    assert "lm_head.weight" not in source.names
    assert torch.equal(load_model(tmp_path / "out").lm_head.weight, values)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: None, "down_proj.weight_scales is missing (int3 g64 asym needs it)"),
        (lambda t: t[:8], "down_proj.weight_scales is [8, 12] bfloat16, expected [256, 12]"),
        (lambda t: t.float(), "down_proj.weight_scales is [256, 12] float32, expected"),
    ],
)
def test_damage_of_a_source_is_one_line(
    change: Any, words: str, packed: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(packed, tmp_path / "copy"))
    file, name = copy / "block-00003.safetensors", NAME.replace("2", "3") + ".weight_scales"
    tensors = read_tensors(file)
    changed = change(tensors.pop(name))
    write_tensors(file, tensors if changed is None else {**tensors, name: changed})
    index = json.loads((copy / INDEX).read_text())
    if changed is None:
        del index["weight_map"][name]
    (copy / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError) as caught:
        opened(copy)
    assert str(file) in str(caught.value)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fmt", [Integer(3, 32, symmetric=False), Sparse(2, 4, Integer(8, -1))])
def test_our_layout_gives_back_what_it_wrote(fmt: Any, tmp_path: Path) -> None:
    tensors = fmt.pack(fmt.nearest(torch.randn(16, 128)))
    written = OWN.write("up", Stored.whole(fmt, tensors, (16, 128)))
    specs = OWN.specs("up", fmt, 16, 128)
    assert {name: tuple(t.shape) for name, t in written.items()} == {
        name: spec.shape for name, spec in specs.items()
    }
    write_tensors(tmp_path / "file", {**written, "norm.weight": torch.ones(3)})
    block = {
        "quant_method": "vllm_compress",
        "version": 1,
        "formats": {"f": fmt.to_dict()},
        "modules": [{"match": "up", "format": "f", "shape": [16, 128]}],
    }
    layout, entries = OwnLayout(block), read_header(tmp_path / "file")
    assert layout.modules(entries) == {"up": (16, 128)}
    assert sorted(layout.names("up", entries)) == sorted(written)
    found, solution = layout.read("up", entries)
    assert found == fmt
    assert torch.equal(found.matrix(solution), fmt.unpack(tensors))
    assert layout.config(layout.spec)["formats"] == {"f": fmt.to_dict()}


def quantized_by(folder: Path, block: dict[str, Any]) -> Path:
    """The model with that block in its config."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": block}))
    return folder


@pytest.fixture
def model(novels_8m: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(novels_8m, tmp_path / "model"))


@pytest.mark.parametrize("method", ["quanto", None])
def test_an_unknown_quant_method_is_refused_in_one_line(
    method: str | None, model: Path, tmp_path: Path
) -> None:
    block = {"bits": 4} if method is None else {"quant_method": method}
    quantized_by(model, block)
    with pytest.raises(CheckpointError) as caught:
        opened(model)
    text = str(caught.value)
    assert text.startswith(f"{model}: already quantized by {method!r}, which cannot be read")
    assert "vllm_compress" in text
    assert "convert the original" in text
    assert "\n" not in text
    with pytest.raises(CheckpointError, match="already quantized by"):
        convert(model, RECIPE, tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()


def test_a_layout_of_another_distribution_is_read_through_the_table(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Eighths(OwnLayout):
        """Tensors `M.eighth` that hold a weight over eight."""

        name = "test-eighths"

        def modules(self, entries: Any) -> dict[str, tuple[int, int]]:
            tail = ".eighth"
            return {n.removesuffix(tail): e.shape for n, e in entries.items() if n.endswith(tail)}

        def names(self, module: str, entries: Any) -> list[str]:
            return [f"{module}.eighth"]

        def read(self, module: str, entries: Any) -> tuple[Any, Tensor]:
            return Dense("float32"), 8 * entries[f"{module}.eighth"].read().float()

    monkeypatch.setitem(LAYOUTS._classes, "test-eighths", Eighths)
    (file,) = model.glob("*.safetensors")
    tensors = read_tensors(file)
    original = tensors.pop(f"{NAME}.weight")
    write_tensors(file, {**tensors, f"{NAME}.eighth": original / 8})
    source = opened(quantized_by(model, {"quant_method": "test-eighths"}))
    assert torch.equal(source.read(f"{NAME}.weight"), original.float())
    assert f"{NAME}.eighth" not in source.entries
    assert f"{NAME}.eighth" in read_entries(model)
