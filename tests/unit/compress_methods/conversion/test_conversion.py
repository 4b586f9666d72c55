"""Conversions from end to end, without vLLM: what comes out, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from compress_methods import convert
from compress_methods.checkpoint.compressed import INCOMPLETE, open_compressed, read_entries
from compress_methods.checkpoint.loading.model import load_model
from compress_methods.checkpoint.safetensors import read_tensors, write_tensors
from compress_methods.conversion.job import open_job
from compress_methods.errors import CheckpointError, CompressError, OutputError, RecipeError
from compress_methods.recipe.matching import recipe_names
from compress_methods.recipe.schema import load_recipe
from tests.robustness.result import contents

REPOSITORY = Path(__file__).resolve().parents[4]
SMALL = {"samples": 4, "length": 64, "held_out": 2}


def recipe(
    bits: int = 4, group: int = 128, algorithm: Any = "rtn", match: Any = "blocks", **more: Any
) -> dict[str, Any]:
    return {
        "formats": {"w": {"format": "integer", "bits": bits, "group_size": group, **more}},
        "modules": [{"match": match, "format": "w", "algorithm": algorithm}],
        "calibration": SMALL,
    }


@pytest.fixture
def model(novels_8m: Path, tmp_path: Path) -> Path:
    """A copy of the model, to be damaged."""
    return Path(shutil.copytree(novels_8m, tmp_path / "model"))


SPECIAL = ("pack-sparse", "experts25")
"""For models that have zeros, or experts."""


@pytest.mark.parametrize("name", [name for name in recipe_names() if name not in SPECIAL])
def test_shipped_recipes_fit_the_model(name: str, novels_8m: Path) -> None:
    job = open_job(novels_8m, name)
    wide = name in ("sparse68", "sharing25-healed")  # values of 16 bits
    most = 0.87 if wide else 0.7 if job.plan.jobs else 0.85
    assert job.plan.compressed_bytes < most * job.plan.original_bytes


def test_the_recipe_for_zeros_does_not_fit_a_model_that_has_none(novels_8m: Path) -> None:
    with pytest.raises(RecipeError, match="no module of novels-8m has zeros"):
        open_job(novels_8m, "pack-sparse")


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_say_when_to_choose_them(name: str) -> None:
    text = (REPOSITORY / "configs" / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    assert "Choose it" in text.split("formats:")[0].split("stages:")[0]


def test_rtn_stores_what_the_format_rounds_to_and_keeps_the_rest(
    novels_8m: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    report = convert(novels_8m, recipe(), out, quiet=True)
    checkpoint, original = open_compressed(out), read_entries(novels_8m)
    fmt = checkpoint.spec.formats["w"]
    for module, matrix in checkpoint.matrices.items():
        weight = original[f"{module}.weight"].read().float()
        assert torch.equal(matrix.unpack(), fmt.unpack(fmt.pack(fmt.nearest(weight))))
    for name, entry in checkpoint.dense.items():
        assert torch.equal(entry.read(), original[name].read())
    assert len(checkpoint.matrices) == 56
    assert report["bytes_after"] == sum(e.nbytes for e in read_entries(out).values())
    assert report["bytes_before"] == sum(e.nbytes for e in original.values())
    assert report["held_out"] is None
    assert not (out / INCOMPLETE).exists()
    assert not (out / ".work").exists()
    assert {"tokenizer.json", "chat_template.jinja", "report.json", "README.md"} <= {
        p.name for p in out.iterdir()
    }


def test_gptq_on_text_reports_the_same_quality_as_a_separate_evaluation(
    novels_8m: Path, some_text: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    from compress_methods.calibration.tokens import CalibrationSettings, load_tokens
    from compress_methods.evaluation.metrics import Sums, compare_logits

    out = tmp_path / "out"
    report = convert(novels_8m, recipe(3, algorithm="gptq"), out, calibration=some_text, quiet=True)
    tokenizer = AutoTokenizer.from_pretrained(novels_8m)
    held = load_tokens(some_text, tokenizer, CalibrationSettings(**SMALL))[SMALL["samples"] :]
    base, compressed = load_model(novels_8m), load_model(out)
    sums = Sums()
    with torch.no_grad():
        for row in held:
            pair = [m(row[None]).logits[0, :-1] for m in (base, compressed)]
            sums += compare_logits(*pair, row[1:])
    found, expected = report["held_out"], sums.result().to_dict()
    assert found["tokens"] == expected["tokens"] == SMALL["held_out"] * (SMALL["length"] - 1)
    for key in ("perplexity", "base_perplexity", "kl"):
        assert found[key] == pytest.approx(expected[key], rel=1e-3)
    assert report["calibration"]["source"].startswith("license.txt")
    assert all(m["output_error"] < 1 for m in report["modules"].values())


def test_without_text_the_model_writes_its_own_and_the_report_says_so(
    novels_8m: Path, tmp_path: Path
) -> None:
    report = convert(novels_8m, recipe(algorithm="gptq"), tmp_path / "out", quiet=True)
    assert report["calibration"]["source"] == "sampled from the model itself"
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "sampled from the model itself" in card


def test_embedding_and_head_are_compressed_too(
    novels_8m: Path, some_text: Path, tmp_path: Path
) -> None:
    both = recipe(8, -1, match=["embedding", "lm_head"])
    both["formats"]["w4"] = {"format": "integer", "bits": 4, "group_size": 64, "symmetric": False}
    both["modules"].append({"match": "blocks", "format": "w4", "algorithm": "gptq"})
    report = convert(novels_8m, both, tmp_path / "out", calibration=some_text, quiet=True)
    matrices = open_compressed(tmp_path / "out").matrices
    assert {"model.embed_tokens", "lm_head"} <= set(matrices)
    assert report["held_out"]["kl"] < 0.5
    assert report["bits_per_weight"] < 6


def test_lm_head_by_gptq_uses_the_last_hidden_states(
    novels_8m: Path, some_text: Path, tmp_path: Path
) -> None:
    def head(algorithm: str) -> dict[str, Any]:
        done = recipe(2, 32, algorithm, match="lm_head")
        return convert(novels_8m, done, tmp_path / algorithm, calibration=some_text, quiet=True)

    assert head("gptq")["held_out"]["kl"] < 0.8 * head("rtn")["held_out"]["kl"]


def test_a_layer_can_be_left_out_by_a_dense_rule(novels_8m: Path, tmp_path: Path) -> None:
    mixed = recipe()
    mixed["formats"]["full"] = {"format": "dense"}
    mixed["modules"].insert(0, {"match": r"re:model\.layers\.0\..*", "format": "full"})
    convert(novels_8m, mixed, tmp_path / "out", quiet=True)
    matrices = open_compressed(tmp_path / "out").matrices
    assert len(matrices) == 49
    assert not any(".layers.0." in name for name in matrices)


def test_sharded_input_gives_the_same_output(novels_8m: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    sharded = tmp_path / "sharded"
    whole = AutoModelForCausalLM.from_pretrained(novels_8m, dtype=torch.bfloat16)
    whole.save_pretrained(sharded, max_shard_size="3MB")
    assert len(list(sharded.glob("*.safetensors"))) > 3
    for path in novels_8m.iterdir():
        if path.suffix in (".json", ".jinja") and path.name != "model.safetensors.index.json":
            shutil.copy(path, sharded)
    convert(sharded, recipe(), tmp_path / "a", quiet=True)
    convert(novels_8m, recipe(), tmp_path / "b", quiet=True)
    a, b = (read_entries(tmp_path / name) for name in "ab")
    assert all(torch.equal(a[name].read(), b[name].read()) for name in b)


def test_pickles_are_refused_unless_allowed(model: Path, tmp_path: Path) -> None:
    expected = tmp_path / "expected"
    convert(model, recipe(), expected, quiet=True)
    torch.save(read_tensors(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="--allow-pickle"):
        convert(model, recipe(), tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()
    convert(model, recipe(), tmp_path / "out", allow_pickle=True, quiet=True)
    for name in ("block-00003.safetensors", "head.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (expected / name).read_bytes()


def test_repeating_a_finished_conversion_changes_nothing(novels_8m: Path, tmp_path: Path) -> None:
    first = convert(novels_8m, recipe(), tmp_path / "out", quiet=True)
    before = contents(tmp_path / "out")
    assert convert(novels_8m, recipe(), tmp_path / "out", quiet=True) == first
    assert contents(tmp_path / "out") == before


BAD_RECIPES: list[tuple[dict[str, Any], list[str]]] = [
    ({**recipe(), "module": []}, ["unknown key 'module'", "did you mean 'modules'?"]),
    (recipe(algorithm="gtpq"), ["unknown algorithm 'gtpq'", "did you mean 'gptq'?"]),
    (recipe(algorithm={"algorithm": "gptq", "dampin": 1}), ["'dampin'", "'damping'"]),
    (recipe(match="block"), ["block", "finds no module"]),
    (recipe(match="re:("), ["modules[0]", "re:("]),
    (recipe(match=r"re:.*\.q_proj"), ["q_proj/k_proj/v_proj", "q_proj: w", "k_proj: dense"]),
    (recipe(match=r"re:.*\.up_proj"), ["gate_proj/up_proj", "must share one format"]),
    (recipe(algorithm="gptq", match="embedding"), ["embed_tokens", "use rtn"]),
    ({**recipe(), "calibration": {"sample": 3}}, ["unknown key 'sample'", "'samples'"]),
    ({**recipe(), "modules": []}, ["modules is []", "non-empty list"]),
    ({"modules": recipe()["modules"]}, ["formats is None"]),
]


@pytest.mark.parametrize(("bad", "words"), BAD_RECIPES)
def test_a_bad_recipe_is_one_line_and_writes_nothing(
    bad: Mapping[str, Any], words: list[str], novels_8m: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError) as caught:
        convert(novels_8m, bad, tmp_path / "out", quiet=True)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_recipe_files_that_are_not_there_or_not_yaml(novels_8m: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="did you mean 'int4-gptq'"):
        load_recipe("int4-gtpq")
    broken = tmp_path / "broken.yaml"
    broken.write_text("formats: {w: [")
    with pytest.raises(RecipeError, match=r"broken\.yaml.*YAML"):
        load_recipe(broken)


def test_group_size_that_does_not_divide(novels_8m: Path, model: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(novels_8m)
    config.intermediate_size, config.num_hidden_layers = 480, 2
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "odd")
    with pytest.raises(
        RecipeError, match=r"down_proj \[256, 480\]: group_size 128 does not divide"
    ):
        convert(tmp_path / "odd", {**recipe(), "on_unfit": "refuse"}, tmp_path / "out", quiet=True)
    with pytest.raises(CompressError, match="tensor-parallel 4 are 64 each, no multiple of 128"):
        convert(
            model,
            {**recipe(), "on_unfit": "refuse"},
            tmp_path / "out",
            tensor_parallel_size=4,
            quiet=True,
        )
    assert not (tmp_path / "out").exists()


def drop_tensor(model: Path) -> None:
    tensors = read_tensors(model / "model.safetensors")
    del tensors["model.layers.3.mlp.up_proj.weight"]
    write_tensors(model / "model.safetensors", tensors)


def reshape_tensor(model: Path) -> None:
    tensors = read_tensors(model / "model.safetensors")
    name = "model.layers.3.mlp.up_proj.weight"
    write_tensors(model / "model.safetensors", {**tensors, name: tensors[name][:-1]})


def truncate(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def index_names_absent_shard(model: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def garbage(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"not a safetensors file at all")


def nothing_there(model: Path) -> None:
    (model / "model.safetensors").unlink()


def unknown_architecture(model: Path) -> None:
    (model / "config.json").write_text('{"model_type": "no-such-model"}')


def broken_config(model: Path) -> None:
    (model / "config.json").write_text("{")


BAD_SOURCES: list[tuple[Callable[[Path], None], list[str]]] = [
    (drop_tensor, ["model.layers.3.mlp.up_proj.weight is missing"]),
    (reshape_tensor, ["model.layers.3.mlp.up_proj.weight is [767, 256]", "expected [768, 256]"]),
    (truncate, ["model.safetensors", "bytes, but its header describes"]),
    (index_names_absent_shard, ["names model-00002-of-00002.safetensors, which is not there"]),
    (garbage, ["model.safetensors", "not a safetensors file"]),
    (nothing_there, ["has neither model.safetensors nor"]),
    (unknown_architecture, ["config.json", "no-such-model"]),
    (broken_config, ["config.json"]),
]


@pytest.mark.parametrize(("damage", "words"), BAD_SOURCES, ids=lambda v: getattr(v, "__name__", ""))
def test_a_damaged_source_is_one_line_and_writes_nothing(
    damage: Callable[[Path], None], words: list[str], model: Path, tmp_path: Path
) -> None:
    damage(model)
    with pytest.raises(CheckpointError) as caught:
        convert(model, recipe(), tmp_path / "out", quiet=True)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("where", ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(where: str, value: float, model: Path, tmp_path: Path) -> None:
    tensors = read_tensors(model / "model.safetensors")
    tensors[where].view(-1)[5] = value
    write_tensors(model / "model.safetensors", tensors)
    with pytest.raises(CheckpointError, match=f"{where} has 1 values that are not finite"):
        convert(model, recipe(), tmp_path / "out", quiet=True)
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_calibration_text_that_is_empty_or_too_short(novels_8m: Path, tmp_path: Path) -> None:
    for text, words in (("", "holds no text"), ("Too short.", "expected")):
        path = tmp_path / "text.txt"
        path.write_text(text)
        with pytest.raises(CompressError, match=words):
            convert(novels_8m, recipe(), tmp_path / "out", calibration=path, quiet=True)
        assert not (tmp_path / "out").exists()


def test_an_output_of_another_recipe_or_of_something_else(novels_8m: Path, tmp_path: Path) -> None:
    convert(novels_8m, recipe(), tmp_path / "out", quiet=True)
    before = contents(tmp_path / "out")
    with pytest.raises(OutputError, match="another model, recipe or calibration"):
        convert(novels_8m, recipe(8), tmp_path / "out", quiet=True)
    assert contents(tmp_path / "out") == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    with pytest.raises(OutputError, match="not empty"):
        convert(novels_8m, recipe(), tmp_path / "mine", quiet=True)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="file"):
        convert(novels_8m, recipe(), tmp_path / "file", quiet=True)


@pytest.mark.parametrize(
    "kind", ["Llama", "Qwen2", "Qwen3", "Mistral", "Gemma3Text", "Phi3", "OPT", "GPT2"]
)
def test_every_family_goes_through_the_blocks_as_transformers_runs_it(
    kind: str, novels_8m: Path, some_text: Path, tmp_path: Path
) -> None:
    """GPTQ, int8 activations, compressed token table: held-out KL is that of the whole models."""
    from transformers import AutoTokenizer

    from compress_methods.calibration.tokens import CalibrationSettings, load_tokens
    from compress_methods.evaluation.metrics import Sums, compare_logits
    from tests.e2e.support.tiny import make_model

    model = make_model(kind, tmp_path / "model", vocab_size=4096)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(novels_8m / name, model)
    mixed = recipe(4, 64, "gptq", symmetric=False)
    mixed["on_unfit"] = "keep"  # vLLM's OPT takes no compressed token table
    mixed["formats"]["w8"] = {"format": "integer", "bits": 8, "group_size": -1}
    mixed["formats"]["w8a8"] = {**mixed["formats"]["w8"], "activations": "int8"}
    mixed["modules"].insert(0, {"match": "embedding", "format": "w8"})
    down = r"re:.*\.(down_proj|fc2|mlp\.c_proj)"
    mixed["modules"].insert(1, {"match": down, "format": "w8a8"})
    report = convert(model, mixed, tmp_path / "out", calibration=some_text, quiet=True)
    settings = CalibrationSettings(**SMALL)
    held = load_tokens(some_text, AutoTokenizer.from_pretrained(model), settings)[
        SMALL["samples"] :
    ]
    base, compressed = load_model(model), load_model(tmp_path / "out")
    sums = Sums()
    with torch.no_grad():
        for row in held:
            pair = [m(row[None]).logits[0, :-1] for m in (base, compressed)]
            sums += compare_logits(*pair, row[1:])
    expected = sums.result()
    assert report["held_out"]["kl"] == pytest.approx(expected.kl, rel=2e-2, abs=1e-6)
    assert report["held_out"]["base_perplexity"] == pytest.approx(
        expected.base_perplexity, rel=1e-4
    )
    assert expected.kl > 0
    layers = len([m for m in report["modules"] if ".1." in m or ".0." in m])
    assert layers == {"Phi3": 8, "OPT": 12, "GPT2": 8}.get(kind, 14)
