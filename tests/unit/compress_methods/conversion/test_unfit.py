"""Matrices that a format cannot hold or vLLM not serve: all named, or kept if the recipe says."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from compress_methods import convert
from compress_methods.calibration.self_generated import batch_rows
from compress_methods.calibration.settings import CalibrationSettings
from compress_methods.checkpoint.compressed import open_compressed
from compress_methods.conversion.job import open_job
from compress_methods.conversion.report import model_card
from compress_methods.errors import RecipeError
from compress_methods.formats import format_from_dict
from compress_methods.formats.wrappers.smaller_group import group_of, smaller_groups
from compress_methods.model.skeleton import build_skeleton
from tests.e2e.support.tiny import SMALL, make_model
from tests.e2e.support.zoo import ZOO

ODD = {**SMALL, "hidden_size": 192, "intermediate_size": 256, "tie_word_embeddings": False}


def recipe(match: Any = "blocks", **more: Any) -> dict[str, Any]:
    return {
        "formats": {"w4": {"format": "integer", "bits": 4, "group_size": 128}},
        "modules": [{"match": match, "format": "w4"}],
        "calibration": {"held_out": 0},
        **more,
    }


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """128 divides the columns of down_proj and o_proj alone."""
    return make_model("Llama", tmp_path / "odd", **ODD)


def test_all_matrices_that_do_not_fit_are_named_in_one_line(odd: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        open_job(odd, recipe(on_unfit="refuse"))
    message = str(caught.value)
    for leaf in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
        assert leaf in message
    assert "model.layers.*.self_attn.q_proj [128, 192]: group_size 128 does not" in message
    assert "(format 'w4', 2 modules)" in message
    assert "down_proj" not in message
    assert "\n" not in message
    assert "on_unfit: keep" in message


@pytest.mark.parametrize("per_rule", [False, True])
def test_they_can_be_kept(odd: Path, tmp_path: Path, per_rule: bool) -> None:
    asked = recipe(on_unfit="keep")
    if per_rule:
        asked = recipe()
        asked["modules"][0]["on_unfit"] = "keep"
    report = convert(odd, asked, tmp_path / "out", quiet=True)
    assert {name.rpartition(".")[2] for name in report["modules"]} == {"o_proj", "down_proj"}
    kept = {name.rpartition(".")[2] for name in report["unfit"]}
    assert kept == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
    assert "does not divide 192" in report["unfit"]["model.layers.1.mlp.up_proj"]
    assert report["dense"]["model.layers.*.mlp.up_proj"] == {
        "matrices": 2,
        "bytes": 2 * 256 * 192 * 4,
    }
    assert "`model.layers.*.mlp.up_proj` x 2" in model_card(report)


def test_neighbours_that_run_as_one_are_kept_together(odd: Path) -> None:
    """128 ranks cannot share 64 rows of k and v; the 128 of q they could."""
    asked = recipe(on_unfit="keep")
    asked["formats"]["w4"]["group_size"] = 64
    plan = open_job(odd, asked, tensor_parallel_size=128).plan
    why = plan.recipe.unfit["model.layers.0.self_attn.q_proj"]
    assert why.startswith("runs as one with k_proj, which stays: 64 rows over tensor-parallel 128")
    assert not any("q_proj" in job.slot.module for job in plan.jobs)


def test_else_they_are_stored_in_smaller_groups(odd: Path, tmp_path: Path) -> None:
    report = convert(odd, recipe(), tmp_path / "out", quiet=True)
    formats = {name.rpartition(".")[2]: m["format"] for name, m in report["modules"].items()}
    small = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    whole = dict.fromkeys(("o_proj", "down_proj"), "int4 g128")
    assert formats == {**whole, **dict.fromkeys(small, "int4 g64")}
    assert {name.rpartition(".")[2] for name in report["regrouped"]} == set(small)
    assert "does not divide 192" in report["regrouped"]["model.layers.1.mlp.up_proj"]
    found = open_compressed(tmp_path / "out")
    assert {group_of(m.format) for n, m in found.matrices.items() if "up_proj" in n} == {64}
    assert {group_of(m.format) for n, m in found.matrices.items() if "down" in n} == {128}


def test_no_half_of_the_group_that_fits_is_refused(tmp_path: Path) -> None:
    odd = {**ODD, "hidden_size": 176, "head_dim": 32}
    model = make_model("Llama", tmp_path / "odd", **odd)
    with pytest.raises(RecipeError, match=r"up_proj \[256, 176\]: group_size 128 does not divide"):
        open_job(model, recipe())


def test_the_group_of_nested_values_is_made_smaller_too() -> None:
    values = {"format": "integer", "group_size": 128}
    fmt = format_from_dict({"format": "sparse", "n": 2, "m": 4, "values": values})
    assert [group_of(smaller) for smaller in smaller_groups(fmt)] == [64, 32]


def test_on_unfit_takes_four_words(odd: Path) -> None:
    with pytest.raises(
        RecipeError, match="on_unfit is 'drop', expected smaller_group, pad, keep, refuse"
    ):
        open_job(odd, recipe(on_unfit="drop"))


def test_models_that_take_no_compressed_embedding_are_known_before_the_server(
    tmp_path: Path,
) -> None:
    kind, config = ZOO["opt"]
    model = make_model(kind, tmp_path / "opt", **config)
    with pytest.raises(RecipeError, match="OPTForCausalLM takes no compressed embedding"):
        open_job(model, recipe("embedding"))
    plan = open_job(model, recipe(["embedding", "blocks"], on_unfit="keep")).plan
    assert list(plan.recipe.unfit) == ["model.decoder.embed_tokens"]


def test_a_matrix_that_vllm_builds_without_a_name_is_known_too(tmp_path: Path) -> None:
    kind, config = ZOO["minicpm3"]
    model = make_model(kind, tmp_path / "minicpm3", **config)
    asked = recipe()
    asked["formats"]["w4"]["group_size"] = 32
    with pytest.raises(RecipeError, match=r"q_a_proj .* gives it no quantization method"):
        open_job(model, asked)


def test_experts_in_one_tensor_are_said_to_stay_dense(tmp_path: Path) -> None:
    kind, config = ZOO["llama4"]
    experts = {**config, "interleave_moe_layer_step": 2, "num_hidden_layers": 2}
    model = make_model(kind, tmp_path / "llama4", **experts)
    report = convert(model, recipe(), tmp_path / "out", quiet=True)
    assert report["dense"]["model.layers.*.feed_forward.experts.gate_up_proj"]["matrices"] == 1
    assert "feed_forward.experts.gate_up_proj" in model_card(report)


def test_generation_needs_no_attention_heads(tmp_path: Path) -> None:
    kind, config = ZOO["mamba2"]
    model = make_model(kind, tmp_path / "mamba2", **config)
    settings = build_skeleton(model).model.config
    assert batch_rows(settings, CalibrationSettings()) >= 1


@pytest.mark.parametrize("name", ["falcon-mha", "bloom", "mpt", "falcon_h1", "mamba2"])
def test_calibrated_conversions_run_to_their_end(
    name: str, tmp_path: Path, novels_8m: Path, some_text: Path
) -> None:
    kind, config = ZOO[name]
    deeper = {key: 4 for key in ("num_hidden_layers", "n_layer", "n_layers") if key in config}
    model = make_model(kind, tmp_path / "model", **{**config, **deeper, "vocab_size": 4096})
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(novels_8m / file, model)
    asked = recipe(on_unfit="keep", calibration={"samples": 4, "length": 64, "held_out": 2})
    asked["formats"]["w4"]["group_size"] = 64
    asked["modules"][0]["algorithm"] = "gptq"
    report = convert(model, asked, tmp_path / "out", calibration=some_text, quiet=True)
    assert 0 < report["held_out"]["kl"] < 1
    assert all(m["output_error"] < 0.1 for m in report["modules"].values())
