"""Every pair of formats, one inside the other, either goes the whole way or is refused in one line:
converted, weighed by the planner to the byte, shown, and served by one rank and by two."""

from __future__ import annotations

import json
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from compress_methods import convert
from compress_methods.checkpoint.compressed import open_compressed
from compress_methods.errors import FormatError
from compress_methods.formats import format_from_dict
from tests.e2e.support.engine import Engine
from tests.e2e.support.served import check_served
from tests.e2e.support.tiny import compress, make_model
from vllm_compress.operations.capacity.footprint.shapes import load_shape
from vllm_compress.operations.capacity.footprint.storage import apply_recipe

INSIDE: dict[str, dict[str, Any]] = {
    "dense": {"format": "dense"},
    "int2": {"format": "integer", "bits": 2, "group_size": 32, "levels": "mid"},
    "int4": {"format": "integer", "bits": 4, "group_size": 32},
    "int6": {"format": "integer", "bits": 6, "group_size": 32, "symmetric": False},
    "int8": {"format": "integer", "bits": 8, "group_size": -1},
    "learned": {"format": "lookup", "bits": 3, "group_size": 32},
    "nf4": {"format": "lookup", "group_size": 32, "table": "nf4"},
    "fp8": {"format": "float", "kind": "fp8"},
    "mxfp4": {"format": "float", "kind": "mxfp4"},
    "nvfp4": {"format": "float", "kind": "nvfp4"},
    "trellis": {"format": "trellis", "state_bits": 8},
    "sparse": {
        "format": "sparse",
        "n": 16,
        "m": 32,
        "values": {"format": "integer", "bits": 8, "group_size": -1},
    },
    "rotated": {
        "format": "rotated",
        "block": 32,
        "base": {"format": "integer", "bits": 4, "group_size": 32},
    },
    "lowrank": {
        "format": "lowrank",
        "rank": 4,
        "base": {"format": "integer", "bits": 4, "group_size": 32},
    },
    "tensor_train": {"format": "tensor_train", "rank": 2},
}
OUTSIDE: dict[str, tuple[str, dict[str, Any]]] = {
    "sparse": ("values", {"format": "sparse", "n": 16, "m": 32}),
    "rotated": ("base", {"format": "rotated", "block": 32}),
    "lowrank": ("base", {"format": "lowrank", "rank": 8}),
}
MEANINGLESS = {
    *(("sparse", name) for name in ("int2", "learned", "trellis", "sparse", "rotated", "lowrank")),
    *(("rotated", name) for name in ("dense", "sparse", "rotated", "lowrank")),
    *(("lowrank", name) for name in ("dense", "lowrank")),
    *((outer, "tensor_train") for outer in ("sparse", "rotated")),
}
FOR_TABLES = ("lowrank", "tensor_train")
PAIRS = [p for p in product(OUTSIDE, INSIDE) if p not in MEANINGLESS and p != FOR_TABLES]
ALONE = [name for name in INSIDE if name not in (*OUTSIDE, "dense", "tensor_train")]
PROMPTS = [[5, 6, 7, 8, 9, 300, 20, 410, 33, 34], [1, 511, 255, 256, 0, 3]]
WORST = 1e-3


def nested(outer: str, inner: str) -> dict[str, Any]:
    key, spec = OUTSIDE[outer]
    return {**spec, key: INSIDE[inner]}


@pytest.mark.parametrize("pair", sorted(MEANINGLESS), ids="-".join)
def test_what_has_no_meaning_is_refused_in_one_line(pair: tuple[str, str]) -> None:
    with pytest.raises(FormatError) as refused:
        format_from_dict(nested(*pair)).check_shape(64, 64)
    assert "expected" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with as many layers as there are formats and pairs of them."""
    folder = tmp_path_factory.mktemp("pairs") / "model"
    layers = len(PAIRS) + len(ALONE)
    return make_model("Llama", folder, num_hidden_layers=layers, initializer_range=0.05)


@pytest.fixture(scope="module")
def formats() -> dict[str, dict[str, Any]]:
    """By name, one for each layer."""
    pairs = {f"{outer}-{inner}": nested(outer, inner) for outer, inner in PAIRS}
    return {name: INSIDE[name] for name in ALONE} | pairs


@pytest.fixture(scope="module")
def packed(model: Path, formats: dict[str, dict[str, Any]]) -> Path:
    match = {rf"re:model\.layers\.{i}\..*": name for i, name in enumerate(formats)}
    return compress(model, model.parent / "packed", formats, match)


@pytest.mark.e2e
@pytest.mark.slow
def test_the_planner_weighs_every_pair_to_the_byte(
    model: Path, packed: Path, formats: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    stored = open_compressed(packed).matrices
    recipe = tmp_path / "recipe.yaml"
    for layer, (name, spec) in enumerate(formats.items()):
        prefix = f"model.layers.{layer}."
        rules = [{"match": rf"re:model\.layers\.{layer}\..*", "format": "w"}]
        recipe.write_text(json.dumps({"formats": {"w": spec}, "modules": rules}))
        planned = [p for p in apply_recipe(load_shape(str(model)), str(recipe)).parts if p.format]
        found = [matrix for module, matrix in stored.items() if module.startswith(prefix)]
        assert len(found) == 7
        assert sum(p.nbytes for p in planned) == sum(m.nbytes for m in found), name
        assert {p.format for p in planned} == {m.format for m in found} == {format_from_dict(spec)}


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_pair_is_served(engine: Engine, packed: Path, ranks: int) -> None:
    check_served(engine, packed, PROMPTS, WORST, ranks=ranks, kernel="cpu_exact", agree=0.9)


STAGES: dict[str, list[dict[str, Any]]] = {
    "prune, low rank, quantize": [
        {"transform": "width", "ffn": 0.25, "multiple": 64},
        {
            "formats": {"w": nested("lowrank", "int4")},
            "modules": [{"match": "blocks", "format": "w", "algorithm": "svd"}],
        },
    ],
    "drop layers, rotate, quantize": [
        {"transform": "depth", "drop": 2},
        {
            "formats": {"w": nested("rotated", "trellis")},
            "modules": [{"match": "blocks", "format": "w", "algorithm": "gptq"}],
        },
    ],
    "share layers, low rank, quantize": [
        {"transform": "sharing", "share": 2},
        {
            "formats": {"w": nested("lowrank", "int4")},
            "modules": [{"match": "blocks", "format": "w", "algorithm": "svd"}],
        },
    ],
}


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_stages_of_several_kinds_are_served(
    name: str, engine: Engine, novels_8m: Path, some_text: Path, tmp_path: Path
) -> None:
    model = make_model("Llama", tmp_path / "model", num_hidden_layers=6, vocab_size=4096)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(novels_8m / file, model)
    calibration = {"samples": 4, "length": 64, "held_out": 0}
    recipe = {"stages": STAGES[name], "calibration": calibration}
    out = tmp_path / "out"
    convert(model, recipe, out, calibration=some_text, quiet=True)
    check_served(engine, out, PROMPTS, WORST, kernel="cpu_exact", agree=0.9)
