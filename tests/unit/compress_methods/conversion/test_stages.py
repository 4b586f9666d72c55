"""Recipes of several stages, and the search for how far to prune."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from compress_methods import convert
from compress_methods.calibration.tokenizer import load_tokenizer
from compress_methods.calibration.tokens import CalibrationSettings, load_tokens
from compress_methods.checkpoint.compressed import INCOMPLETE, open_compressed, read_entries
from compress_methods.checkpoint.loading.model import load_model
from compress_methods.errors import CompressError, OutputError, RecipeError
from compress_methods.evaluation.metrics import Sums, compare_logits
from compress_methods.recipe.stages import load_staged
from compress_methods.transforms import Part, Pass, register_transform
from vllm_compress.cli import main

SMALL = {"samples": 4, "length": 64, "held_out": 2}
DEPTH = {"transform": "depth", "drop": 2}
WIDTH = {"transform": "width", "ffn": "50%"}
QUICK = {"algorithm": "gptq", "sweeps": 0}
PACKING = {
    "formats": {"w": {"format": "integer", "bits": 4, "group_size": 128}},
    "modules": [{"match": "blocks", "format": "w", "algorithm": QUICK}],
}


def chain(*stages: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"stages": list(stages), "calibration": SMALL, **more}


@pytest.fixture(scope="module")
def chained(novels_8m: Path, some_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers dropped twice, narrowed, packed."""
    folder = tmp_path_factory.mktemp("chained")
    (folder / "mine.yaml").write_text(
        json.dumps(chain(DEPTH, WIDTH, {**DEPTH, "drop": 1}, PACKING))
    )
    arguments = [str(novels_8m), "--recipe", str(folder / "mine.yaml"), "-o", str(folder / "out")]
    assert main(["convert", *arguments, "--calibration", str(some_text), "--quiet"]) == 0
    return folder / "out"


def report_of(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "report.json").read_text(encoding="utf-8"))
    return found


def test_check_states_the_bytes_of_every_stage_before_it_runs(
    chained: Path, novels_8m: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    recipe = str(chained.parent / "mine.yaml")
    out = ["-o", str(tmp_path / "out")]
    assert main(["check", str(novels_8m), "--recipe", recipe, *out, "--json"]) == 0
    found, report = json.loads(capsys.readouterr().out), report_of(chained)
    written = sum(entry.nbytes for entry in read_entries(chained).values())
    assert found["bytes_after"] == report["bytes_after"] == written
    assert found["bytes_before"] == sum(e.nbytes for e in read_entries(novels_8m).values())
    for line, stage in zip(found["stages"], report["stages"], strict=True):
        assert f"-> {stage['bytes_after'] / 1e6:,.2f} MB" in line
    assert not (tmp_path / "out").exists()


def test_every_tensor_of_the_original_is_accounted_for(chained: Path, novels_8m: Path) -> None:
    report, checkpoint = report_of(chained), open_compressed(chained)
    original = set(read_entries(novels_8m))
    layers = list(range(8))
    for stage in report["stages"]:
        layers = [layers[i] for i in stage.get("layers", range(len(layers)))]
    assert len(layers) == 5
    stored = {f"{module}.weight" for module in checkpoint.matrices} | set(checkpoint.dense)
    here = set()
    for name in stored:
        parts = name.split(".")
        if parts[1] == "layers":
            parts[2] = str(layers[int(parts[2])])
        here.add(".".join(parts))
    assert here.isdisjoint(report["dropped"])
    assert here | set(report["dropped"]) == original
    for name, reason in report["dropped"].items():
        assert "dropped by depth, influence 0." in reason, name
    assert not (chained / ".work").exists()
    assert not (chained / INCOMPLETE).exists()


def test_what_is_lost_is_measured_against_the_original(
    chained: Path, novels_8m: Path, some_text: Path
) -> None:
    tokens = load_tokens(some_text, load_tokenizer(novels_8m), CalibrationSettings(**SMALL))
    base, compressed = load_model(novels_8m), load_model(chained)
    sums = Sums()
    with torch.no_grad():
        for row in tokens[SMALL["samples"] :]:
            pair = [m(row[None]).logits[0, :-1] for m in (base, compressed)]
            sums += compare_logits(*pair, row[1:])
    found, expected = report_of(chained)["held_out"], sums.result().to_dict()
    for key in ("perplexity", "base_perplexity", "kl"):
        assert found[key] == pytest.approx(expected[key], rel=1e-3)


def test_repeating_a_finished_chain_changes_nothing_and_another_recipe_is_refused(
    chained: Path, novels_8m: Path, some_text: Path
) -> None:
    recipe = chained.parent / "mine.yaml"
    again = convert(novels_8m, recipe, chained, calibration=some_text, quiet=True)
    assert again == report_of(chained)
    with pytest.raises(OutputError, match="another model, recipe or calibration"):
        convert(novels_8m, chain(DEPTH), chained, calibration=some_text, quiet=True)


def test_stages_alone_are_a_plain_model_for_transformers(
    novels_8m: Path, some_text: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    out = tmp_path / "out"
    report = convert(novels_8m, chain(WIDTH, DEPTH), out, calibration=some_text, quiet=True)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert sum(p.numel() for p in model.parameters()) == report["parameters"]
    assert (model.config.num_hidden_layers, model.config.intermediate_size) == (6, 384)
    tokens = torch.arange(5, 60)[None]
    with torch.no_grad():
        expected = model(tokens).logits
        assert torch.allclose(load_model(out)(tokens).logits, expected, atol=1e-4)
    assert main(["inspect", str(out)]) == 0


BAD_CHAINS: list[tuple[dict[str, Any], list[str]]] = [
    ({"stages": []}, ["stages is []", "non-empty list"]),
    ({"stages": [PACKING, DEPTH]}, ["stages[1]", "nothing can follow the packing"]),
    ({"stages": [PACKING]}, ["only the packing"]),
    ({"stages": [{"drop": 2}]}, ["stages[0]", "expected a transform, or formats"]),
    ({"stages": [DEPTH], "modules": []}, ["unknown key 'modules'"]),
    ({"stages": [DEPTH, {**PACKING, "calibration": {}}]}, ["stages[1]", "'calibration'"]),
    (chain(DEPTH, prune_to={"size": "50%"}), ["no value is `search`"]),
    (chain({**DEPTH, "drop": "search"}), ["stages[0].drop", "prune_to"]),
    (chain({**DEPTH, "drop": "search"}, prune_to={}), ["perplexity_increase, size or both"]),
    (chain({**DEPTH, "drop": "search"}, prune_to={"sise": 1}), ["'sise'", "'size'"]),
    (chain({**DEPTH, "drop": "search"}, prune_to={"size": 2}), ["size is 2"]),
    (
        {
            **chain({**DEPTH, "drop": "search"}, prune_to={"size": "50%"}),
            "calibration": {"held_out": 0},
        },
        ["held-out text"],
    ),
    (
        chain({**WIDTH, "multiple": 64, "ffn": "25%"}, {**PACKING, "on_unfit": "refuse"}),
        ["down_proj [256, 576]", "group_size 128 does not divide"],
    ),
    (chain({**DEPTH, "drop": 7}, {**DEPTH, "drop": 1}), ["drop is 1 layers, the model has 1"]),
]


@pytest.mark.parametrize(("bad", "words"), BAD_CHAINS)
def test_a_bad_chain_is_one_line_and_writes_nothing(
    bad: dict[str, Any], words: list[str], novels_8m: Path, some_text: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError) as caught:
        convert(novels_8m, bad, tmp_path / "out", calibration=some_text, quiet=True)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_result_that_ranks_cannot_share_is_refused(novels_8m: Path, tmp_path: Path) -> None:
    narrow = {"transform": "width", "ffn": 0.1, "multiple": 5}
    with pytest.raises(CompressError, match="width: leaves 695 channels, which tensor-parallel 2"):
        convert(novels_8m, chain(narrow), tmp_path / "out", tensor_parallel_size=2, quiet=True)
    half = {"transform": "width", "ffn": 0, "attention": 0.5, "tensor_parallel": 2}
    with pytest.raises(CompressError, match="leaves 2 heads and 1 KV heads, which tensor-parallel"):
        convert(novels_8m, chain(half), tmp_path / "out", tensor_parallel_size=4, quiet=True)
    assert not (tmp_path / "out").exists()


def searched(**target: Any) -> dict[str, Any]:
    return chain({"transform": "width", "ffn": "search"}, prune_to=target)


@pytest.fixture(scope="module")
def tried(novels_8m: Path, some_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tried") / "out"
    recipe = searched(perplexity_increase="7%")
    convert(novels_8m, recipe, out, calibration=some_text, quiet=True)
    return out


def test_a_search_keeps_the_smallest_result_within_the_bound(tried: Path) -> None:
    report = report_of(tried)
    found = report["search"]
    within = [p for p in found["points"] if p["within"]]
    assert all((p["increase"] <= 0.07) == p["within"] for p in found["points"])
    best = min(within, key=lambda p: p["bytes"])
    assert (best["level"], best["bytes"]) == (found["level"], report["bytes_after"])
    chose = found["chosen_on"]
    assert chose["perplexity"] <= 1.07 * chose["base_perplexity"]
    # Widths come in steps of 128: the next one down was tried, and is too much.
    beyond = [p for p in found["points"] if not p["within"]]
    step = 3 * 128 * 256 * 2 * 8
    assert best["bytes"] - step in [p["bytes"] for p in beyond]


def test_a_search_leaves_its_curve_and_nothing_else(tried: Path) -> None:
    from matplotlib.image import imread

    picture = imread(tried / "curve.png")
    assert picture.shape[0] > 300
    assert picture.std() > 0
    assert not (tried / ".work").exists()
    assert not (tried / INCOMPLETE).exists()
    written = sum(entry.nbytes for entry in read_entries(tried).values())
    assert written == report_of(tried)["bytes_after"]


def test_a_bound_on_size_takes_the_largest_result_below_it(
    novels_8m: Path, some_text: Path, tmp_path: Path
) -> None:
    recipe = searched(size="70%")
    report = convert(novels_8m, recipe, tmp_path / "out", calibration=some_text, quiet=True)
    step = 3 * 128 * 256 * 2 * 8
    assert 0.7 * report["bytes_before"] - step < report["bytes_after"]
    assert report["bytes_after"] <= 0.7 * report["bytes_before"]


@pytest.mark.parametrize(
    ("stage", "target", "words"),
    [
        (WIDTH, {"size": "20%"}, r"size 20% cannot be met; the furthest level, 85%, leaves 53.1%"),
        (
            DEPTH,
            {"perplexity_increase": "0.1%", "size": "45%"},
            r"increase 0.1% cannot be met; the best, at level 75% and 43.[78]% of the bytes, is \+",
        ),
    ],
)
def test_a_target_that_cannot_be_met_says_the_best_and_exits_2(
    stage: dict[str, Any],
    target: dict[str, str],
    words: str,
    novels_8m: Path,
    some_text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    knob = "drop" if stage is DEPTH else "ffn"
    recipe = chain({**stage, knob: "search"}, prune_to={**target, "steps": 20})
    (tmp_path / "mine.yaml").write_text(json.dumps(recipe))
    arguments = [str(novels_8m), "--recipe", str(tmp_path / "mine.yaml"), "--quiet"]
    arguments += ["-o", str(tmp_path / "out"), "--calibration", str(some_text)]
    assert main(["convert", *arguments]) == 2
    printed = capsys.readouterr().err.strip()
    assert re.search(words, printed), printed
    assert "\n" not in printed
    assert not (tmp_path / "out").exists()


def test_check_says_what_a_search_ranges_over(
    novels_8m: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_text(json.dumps(searched(size="60%")))
    arguments = [str(novels_8m), "--recipe", str(tmp_path / "mine.yaml"), "--json"]
    assert main(["check", *arguments, "-o", str(tmp_path / "out")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["levels"] == 5
    assert found["bytes_after_least"] < found["bytes_after"] < found["bytes_before"]


def test_search_sets_every_marked_value_to_the_same_level() -> None:
    recipe = chain(
        {"transform": "depth", "drop": "search"},
        {"transform": "width", "ffn": "search"},
        prune_to={"size": 0.5},
    )
    depth, width = load_staged(recipe).at(0.25).to_dict()["stages"]
    assert (depth["drop"], width["ffn"], width["attention"]) == (0.25, 0.25, 0)


def test_a_transform_of_another_distribution_needs_only_its_class(
    novels_8m: Path, some_text: Path, tmp_path: Path
) -> None:
    @register_transform
    @dataclass(frozen=True)
    class Scale(Pass):
        """Doubles up_proj and halves down_proj, which changes nothing."""

        name: ClassVar[str] = "test-scale"

        def visit(self, part: Part) -> None:
            for slot in part.slots:
                for leaf, factor in (("up_proj", 2), ("down_proj", 0.5)):
                    if slot.module.endswith(leaf):
                        part.replace(slot.parameter, part.weight(slot) * factor)

    def run(name: str, *stages: dict[str, Any]) -> dict[str, Any]:
        out = tmp_path / name
        return convert(novels_8m, chain(*stages), out, calibration=some_text, quiet=True)

    report = run("out", {"transform": "test-scale"})
    assert report["stages"][0]["held_out"]["kl"] == pytest.approx(0, abs=1e-6)
    assert report["held_out"]["kl"] == pytest.approx(0, abs=1e-6)
    both, depth = run("both", {"transform": "test-scale"}, DEPTH), run("depth", DEPTH)
    # It keeps shapes, so it shares the sweep of what follows it.
    assert [stage["stage"] for stage in both["stages"]] == ["test-scale+depth"]
    assert both["stages"][0]["layers"] == depth["stages"][0]["layers"]
    assert both["held_out"]["kl"] == pytest.approx(depth["held_out"]["kl"], rel=1e-3)
    before = read_entries(novels_8m)
    name = "model.layers.0.mlp.up_proj.weight"
    for folder in ("out", "both"):
        after = read_entries(tmp_path / folder)
        assert torch.equal(2 * before[name].read(), after[name].read())
