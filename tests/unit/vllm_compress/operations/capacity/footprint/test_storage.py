"""Bytes before conversion: shapes that are shipped, headers, and what recipes make of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from compress_methods import convert
from compress_methods.checkpoint.safetensors import read_tensors, write_tensors
from compress_methods.errors import CheckpointError, RecipeError
from compress_methods.system.resources import config_path
from tests.e2e.support.tiny import MODELS, make_model
from tests.e2e.support.zoo import MIXTURES
from vllm_compress.operations.capacity.footprint.memory import (
    Layout,
    part_bytes,
    rank_shape,
    refusal,
    stage_weights,
)
from vllm_compress.operations.capacity.footprint.shapes import (
    Tensor,
    load_shape,
    read_shape,
    shipped_shapes,
)
from vllm_compress.operations.capacity.footprint.storage import apply_recipe, as_it_is

# What huggingface.co shows for each repository ("Model size"), DeepSeek-V3 from its paper: 671 B.
PUBLISHED = {
    "llama-4-scout": 108_641_793_536,
    "llama-4-maverick": 401_583_781_376,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "mixtral-8x7b": 46_702_792_704,
    "gemma-3-27b": 27_432_406_640,
    "qwen3-8b": 8_190_735_360,
    "qwen3-30b-a3b": 30_532_122_624,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_shipped_shapes_have_as_many_weights_as_published(name: str) -> None:
    assert load_shape(name).parameters == PUBLISHED[name]


def test_deepseek_v3_has_671_billion_weights_and_a_latent_cache() -> None:
    shape = load_shape("deepseek-v3")
    assert round(shape.parameters / 1e9) == 671
    assert shape.kv_values == 512 + 64


def test_maverick_is_800_gb_in_bf16() -> None:
    assert as_it_is(load_shape("llama-4-maverick")).weight_bytes == pytest.approx(800e9, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("name", shipped_shapes())
def test_shipped_shapes_are_what_transformers_builds(name: str) -> None:
    from vllm_compress.operations.capacity.listing import list_parameters

    block = json.loads(config_path("models", f"{name}.json").read_text())
    assert list_parameters(block["config"]) == block["tensors"]


def test_a_plan_reads_recipes_and_formats_without_torch() -> None:
    code = (
        "import sys; from vllm_compress.cli import main; "
        "main(['plan', 'llama-3.2-1b', '--recipe', 'sparse50-int4-joint', "
        "'--hardware', 'l4', '--rate', '1/s']); "
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("ways", [1, 2, 4, 8])
def test_int4_matrices_take_half_a_byte_and_two_bytes_a_group(ways: int) -> None:
    shape = load_shape("llama-3.1-8b")
    parts = [part for part in apply_recipe(shape, "int4-gptq").parts if part.format is not None]
    assert len(parts) == 7
    for part in parts:
        rows, cols = rank_shape(shape, part.matrix, ways)
        assert part.bytes_of(rows, cols) == rows * cols // 2 + 2 * rows * cols // 128


@pytest.mark.parametrize("ways", [1, 2, 4, 8])
def test_tables_take_eight_bytes_for_sixteen_rows_on_every_rank(ways: int) -> None:
    """Where columns are cut, each rank has all of them."""
    shape = load_shape("llama-3.1-8b")
    parts = [part for part in apply_recipe(shape, "lookup3").parts if part.format is not None]
    assert len(parts) == 7
    for part in parts:
        rows, cols = rank_shape(shape, part.matrix, ways)
        expected = rows * cols * 3 // 8 + 2 * rows * cols // 128 + 8 * rows // 16
        assert part.bytes_of(rows, cols) == expected


@pytest.mark.parametrize("ways", [1, 2, 4, 8])
def test_floats_take_a_byte_a_group_and_rows_their_scales_on_every_rank(ways: int) -> None:
    shape = load_shape("llama-3.1-8b")
    for recipe, bits, group, of_rows in (("mxfp4", 4, 32, 0), ("nvfp4", 4, 16, 4)):
        parts = [part for part in apply_recipe(shape, recipe).parts if part.format is not None]
        assert len(parts) == 7
        for part in parts:
            rows, cols = rank_shape(shape, part.matrix, ways)
            expected = rows * cols * bits // 8 + rows * cols // group + of_rows * rows
            assert part.bytes_of(rows, cols) == expected


@pytest.mark.parametrize("recipe", ["depth25", "width25-int4", "pack-sparse", "a file"])
def test_what_shapes_or_weights_decide_has_to_be_converted_first(
    recipe: str, tmp_path: Path
) -> None:
    if recipe == "a file":
        recipe = str(tmp_path / "recipe.yaml")
        Path(recipe).write_text("stages: [{transform: depth, drop: 1}]\n")
    with pytest.raises(RecipeError, match="convert the model, then plan the result"):
        apply_recipe(load_shape("llama-3.2-1b"), recipe)


@pytest.mark.parametrize("recipe", ["int8-smooth", "int8-rotation"])
def test_what_only_scales_or_turns_matrices_weighs_what_its_packing_does(recipe: str) -> None:
    shape = load_shape("llama-3.1-8b")
    found, plain = apply_recipe(shape, recipe), apply_recipe(shape, "int8-dynamic")
    assert (found.name, found.weight_bytes) == (recipe, plain.weight_bytes)
    assert found.label == plain.label


def test_a_rotation_parts_a_tied_head_from_its_embedding() -> None:
    with pytest.raises(RecipeError, match=r"format \(rotation\); convert the model"):
        apply_recipe(load_shape("llama-3.2-1b"), "int8-rotation")


def test_of_a_gate_the_first_recipe_is_planned(tmp_path: Path) -> None:
    recipe = tmp_path / "gated.yaml"
    text = config_path("recipes", "int4-gptq.yaml").read_text()
    gate = "accept: {kl: 0.01}\nfallback: [int8]\n"
    recipe.write_text(text.replace("held_out: 8", "held_out: 32") + gate)
    shape = load_shape("llama-3.1-8b")
    assert apply_recipe(shape, str(recipe)).parts == apply_recipe(shape, "int4-gptq").parts


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_recipes_make_of_headers_what_a_conversion_plans(kind: str, tmp_path: Path) -> None:
    from compress_methods.conversion.job import open_job

    model = make_model(kind, tmp_path / "model", **{"dtype": "bfloat16"})
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "formats: {w: {format: integer, bits: 4, group_size: 32, symmetric: false}}\n"
        "modules: [{match: blocks, format: w}]\n"
    )
    shape = load_shape(str(model))
    planned = open_job(model, recipe, False, 1).plan
    itemsize = {m.itemsize for m in shape.matrices}
    assert itemsize == {2}
    found = apply_recipe(shape, str(recipe))
    kept = sum(p.nbytes for p in found.parts if p.format is None)
    # transformers saves the random models in float32; vLLM, and so the planner, counts 2 bytes.
    jobs = sum(spec.nbytes for job in planned.jobs for spec in job.specs(planned.layout).values())
    assert found.weight_bytes - kept == jobs
    assert kept == (planned.compressed_bytes - jobs) // 2


def test_a_low_rank_recipe_weighs_its_base_and_its_factors() -> None:
    """A rank of 32 in 4 bits, a scale for each of their rows."""
    shape = load_shape("llama-3.1-8b")
    plain, whole = (apply_recipe(shape, name).parts for name in ("int2-gptq", "int2-lowrank"))
    for base, part in zip(plain, whole, strict=True):
        m, more = part.matrix, 0
        if part.format is not None:
            more = 32 * (m.rows + m.cols) // 2 + 2 * (m.rows + 32)
            assert part.format.describe() == "int2 g128 mid + rank 32 int4 row"
        assert part.bytes_of(m.rows, m.cols) == base.bytes_of(m.rows, m.cols) + more


def test_a_compressed_directory_weighs_what_its_files_do(novels_int4: Path) -> None:
    from vllm_compress.metrics.checkpoint_summary import summarize_checkpoint

    scheme = as_it_is(load_shape(str(novels_int4)))
    assert (
        scheme.weight_bytes == summarize_checkpoint(str(novels_int4), "vllm_compress").weight_bytes
    )
    assert scheme.label == "int4 g128"
    with pytest.raises(RecipeError, match="already quantized"):
        apply_recipe(scheme.shape, "int8")


@pytest.fixture(scope="module")
def novels_int4(novels_8m: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from compress_methods import convert

    out = tmp_path_factory.mktemp("capacity") / "int4"
    convert(novels_8m, "int4-rtn", out, quiet=True)
    return out


def test_a_recipe_before_conversion_weighs_what_the_result_does(
    novels_8m: Path, novels_int4: Path
) -> None:
    planned = apply_recipe(load_shape(str(novels_8m)), "int4-rtn").weight_bytes
    assert planned == as_it_is(load_shape(str(novels_int4))).weight_bytes


LLAMA: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "max_position_embeddings": 128,
}


def test_experts_count_alike_one_by_one_and_in_one_tensor() -> None:
    names = [f"model.layers.{i}.mlp.experts" for i in range(2)]
    apart = [
        Tensor(f"{name}.{e}.{leaf}.weight", shape, 2)
        for name in names
        for e in range(8)
        for leaf, shape in (("gate_proj", (96, 64)), ("up_proj", (96, 64)), ("down_proj", (64, 96)))
    ]
    joined = [
        Tensor(f"{name}.{leaf}", shape, 2)
        for name in names
        for leaf, shape in (("gate_up_proj", (8, 192, 64)), ("down_proj", (8, 64, 96)))
    ]
    turned = [Tensor(t.name, (t.shape[0], t.shape[2], t.shape[1]), 2) for t in joined]
    weights = [
        apply_recipe(read_shape("m", LLAMA, tensors), "int8").weight_bytes
        for tensors in (apart, joined, turned)
    ]
    assert weights[0] == weights[1] == weights[2]


BLOCKS_ONLY = """
formats: {w: {format: integer, bits: 8, group_size: -1}}
modules: [{match: blocks, format: w, algorithm: rtn}]
"""


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_weigh_what_is_converted(tmp_path: Path, name: str) -> None:
    """Those that a rule names are compressed, others are not."""
    kind, config = MIXTURES[name]
    model = make_model(kind, tmp_path / "m", **config)
    file = model / "model.safetensors"
    write_tensors(file, {name: t.bfloat16() for name, t in read_tensors(file).items()})
    (tmp_path / "blocks.yaml").write_text(BLOCKS_ONLY)
    planned = []
    for recipe in ("int8", str(tmp_path / "blocks.yaml")):
        scheme = apply_recipe(load_shape(str(model)), recipe)
        out = tmp_path / Path(recipe).stem
        assert scheme.weight_bytes == convert(model, recipe, out, quiet=True)["bytes_after"]
        planned.append(scheme.weight_bytes)
    assert planned[0] < planned[1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": None}, "no hidden_size"),
        ({"layer_types": ["linear_attention"] * 2}, "no layer keeps a KV cache"),
    ],
)
def test_configs_that_cannot_be_planned_say_why(change: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        read_shape("m", {**LLAMA, **change}, [])


def test_shared_layers_weigh_nothing_and_are_on_one_stage(
    novels_8m: Path, some_text: Path, tmp_path: Path
) -> None:
    """The plan of the recipe, and that of its result, to the byte."""
    rule = {"match": "blocks", "format": "w"}
    packing = {"formats": {"w": {"format": "integer", "bits": 4}}, "modules": [rule]}
    calibration = {"samples": 2, "length": 64, "held_out": 0}
    recipe = {"stages": [{"transform": "sharing"}, packing], "calibration": calibration}
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe))
    report = convert(novels_8m, recipe, tmp_path / "out", calibration=some_text, quiet=True)
    planned = apply_recipe(load_shape(str(novels_8m)), str(file))
    stored = as_it_is(load_shape(str(tmp_path / "out")))
    for scheme in (planned, stored):
        assert scheme.weight_bytes == report["bytes_after"]
        assert sum(stage_weights(scheme, Layout())) == report["bytes_after"]
        assert refusal(scheme, Layout(tp=2)) is None
        assert "share weights" in (refusal(scheme, Layout(pp=8)) or "")
    whole = apply_recipe(load_shape(str(novels_8m)), "int4-rtn")
    assert stored.shape.parameters == whole.shape.parameters


def test_cores_of_a_table_are_copied_to_every_rank(tmp_path: Path) -> None:
    shape, bytes_of = load_shape("llama-3.2-1b"), {}
    for kind in ("rows", "table"):
        train = {"format": "tensor_train", "kind": kind, "rank": 8}
        rules = [{"match": "embedding", "format": "t"}]
        file = tmp_path / f"{kind}.yaml"
        file.write_text(json.dumps({"formats": {"t": train}, "modules": rules}))
        parts = apply_recipe(shape, str(file)).parts
        (part,) = (part for part in parts if part.format is not None)
        bytes_of[kind] = [part_bytes(shape, part, tp) for tp in (1, 2)]
        assert bytes_of[kind][0] == part.nbytes
    assert bytes_of["rows"][1] == bytes_of["rows"][0] / 2
    assert bytes_of["table"][1] == bytes_of["table"][0]
