"""A gate publishes what is within its bounds, and nothing else, however often it is stopped."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from compress_methods import convert
from compress_methods.checkpoint.compressed import INCOMPLETE, open_compressed
from compress_methods.checkpoint.integrity import require_intact
from compress_methods.errors import CalibrationError, NotAccepted, RecipeError
from compress_methods.recipe.stages import load_staged
from compress_methods.search.verdict import BEYOND, UNDECIDED, WITHIN, Verdict, costliest
from tests.robustness.result import tiny_model
from vllm_compress.cli import main

CALIBRATION = {"samples": 2, "length": 32, "held_out": 24}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny") / "model")


def packing(bits: int) -> dict[str, Any]:
    return {
        "formats": {"w": {"format": "integer", "bits": bits, "group_size": 32}},
        "modules": [{"match": "blocks", "format": "w"}],
    }


def gated(bits: int, accept: dict[str, Any], *fallback: Any, **more: Any) -> dict[str, Any]:
    block = {**packing(bits), "calibration": CALIBRATION, "accept": accept}
    return {**block, "fallback": list(fallback), **more} if fallback else {**block, **more}


def test_int2_is_stopped_and_int4_published_in_its_place(
    novels_8m: Path, validation_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At 0.05 nats per token, from 2 bits to the recipe of 4 that comes along."""
    recipe, out = tmp_path / "mine.yaml", tmp_path / "out"
    block = gated(2, {"kl": 0.05}, "int4-rtn")
    block |= {"calibration": {"samples": 2, "length": 128, "held_out": 20}}
    recipe.write_text(yaml.safe_dump(block))
    command = ["convert", str(novels_8m), "-o", str(out), "--recipe", str(recipe), "--json"]
    assert main([*command, "--calibration", str(validation_text)]) == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert report == json.loads((out / "report.json").read_text())
    first, second = report["gate"]["tries"]
    assert (first["recipe"], first["accepted"]) == ("mine", False)
    assert (second["recipe"], second["accepted"]) == ("int4-rtn", True)
    (bound,) = first["bounds"]
    assert bound["state"] == BEYOND
    assert bound["value"] > bound["low"] > 0.05
    assert "mine: not accepted: kl 0." in printed.err
    assert "is beyond 0.05, largest error of the weights in layers " in printed.err
    # What is published is int4, whole, and says what else was tried.
    assert {m["format"] for m in report["modules"].values()} == {"int4 g128"}
    assert report["held_out"]["intervals"]["kl"][1] < 0.05
    assert report["held_out"] == second["held_out"]
    require_intact(out)
    assert {m.format.describe() for m in open_compressed(out).matrices.values()} == {"int4 g128"}
    assert not (out / ".work").exists()
    card = (out / "README.md").read_text()
    assert "compressed with `int4-rtn`" in card
    assert f"| `mine` | {first['bytes'] / 2**20:.1f} MiB | no | {first['said']} |" in card
    # The same command finds it done.
    assert main([*command, "--calibration", str(validation_text), "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out) == report


def test_nothing_is_published_where_nothing_passes(
    tiny: Path, some_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out = tmp_path / "mine.yaml", tmp_path / "out"
    bounds = {"kl": 1e-9, "perplexity_increase": "0.0001%", "top1": "99.99%"}
    recipe.write_text(yaml.safe_dump(gated(2, bounds, packing(3))))
    command = ["convert", str(tiny), "-o", str(out), "--recipe", str(recipe), "--json"]
    assert main([*command, "--calibration", str(some_text), "--quiet"]) == 3
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert line.startswith(f"vllm-compress: error: {out}: nothing published; mine: kl ")
    assert "; fallback[0]: kl " in line
    tries = json.loads(printed.out)["gate"]["tries"]
    assert [[b["bound"] for b in tried["bounds"]] for tried in tries] == [list(bounds)] * 2
    assert not out.exists()


class Stop(Exception):
    """Stands in for a kill."""


@pytest.mark.parametrize("moment", ["judged", "recorded", "discarded"])
def test_a_stopped_gate_ends_as_one_that_was_not(
    moment: str,
    tiny: Path,
    some_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from compress_methods.conversion.journal import Journal
    from compress_methods.search import gate

    out, block = tmp_path / "out", gated(2, {"kl": 1e-9})

    def stop(*_: Any, **__: Any) -> None:
        raise Stop

    with monkeypatch.context() as patch:
        if moment == "judged":
            patch.setattr(gate, "judge", stop)
        elif moment == "recorded":
            patch.setattr(gate, "shutil", SimpleNamespace(rmtree=stop))
        else:
            patch.setattr(Journal, "discard", stop)
        with pytest.raises(Stop):
            convert(tiny, block, out, calibration=some_text, quiet=True)
    assert (out / INCOMPLETE).exists()
    assert not (out / "report.json").exists()
    with pytest.raises(NotAccepted, match="custom: kl") as caught:
        convert(tiny, block, out, calibration=some_text, quiet=True)
    assert not out.exists()
    with pytest.raises(NotAccepted) as again:
        convert(tiny, block, out, calibration=some_text, quiet=True)
    assert again.value.tries == caught.value.tries


def test_a_gate_stopped_while_it_publishes_goes_on(
    tiny: Path, some_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    block = gated(2, {"kl": 1e-5}, packing(8))
    convert(tiny, block, whole, calibration=some_text, quiet=True)
    moved = Path.replace

    def stop(self: Path, target: Any) -> Any:
        if Path(target) == out / "config.json":
            raise Stop
        return moved(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stop)
        with pytest.raises(Stop):
            convert(tiny, block, out, calibration=some_text, quiet=True)
    assert (out / INCOMPLETE).exists()
    assert not (out / "report.json").exists()
    report = convert(tiny, block, out, calibration=some_text, quiet=True)
    assert [tried["accepted"] for tried in report["gate"]["tries"]] == [False, True]
    files = [p.name for p in whole.iterdir() if p.suffix not in (".md", ".json")]
    assert all((out / n).read_bytes() == (whole / n).read_bytes() for n in files)


def test_a_gate_of_a_staged_recipe_measures_against_the_original(
    tiny: Path, some_text: Path, tmp_path: Path
) -> None:
    stages = [{"transform": "depth", "drop": 1}, packing(8)]
    block = {"stages": stages, "calibration": CALIBRATION}
    block |= {"accept": {"top1": "90%"}, "fallback": ["int8"]}
    report = convert(tiny, block, tmp_path / "out", calibration=some_text, quiet=True)
    pruned, whole = report["gate"]["tries"]
    assert (pruned["accepted"], whole["accepted"]) == (False, True)
    assert pruned["held_out"]["top1_agreement"] < 0.9 < whole["held_out"]["top1_agreement"]
    assert report["recipe"]["name"] == "int8"


def questions(path: Path, count: int, right: str) -> Path:
    rows = [
        {"prompt": f"She looked at the {n} of them and", "choices": ["was", "xq zj"], "answer": a}
        for n, a in ((n, right if n % 2 else "was") for n in range(count))
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_a_task_decides_and_too_few_questions_decide_nothing(
    tiny: Path, some_text: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipes" / "mine.yaml"
    recipe.parent.mkdir()
    recipe.write_text(yaml.safe_dump(gated(8, {"task": {"file": "q.jsonl", "drop": "10%"}})))
    path = questions(recipe.parent / "q.jsonl", 10, "xq zj")  # beside the recipe
    with pytest.raises(NotAccepted, match=r"10 questions are too few to tell, about \d+ may do"):
        convert(tiny, recipe, tmp_path / "out", calibration=some_text, quiet=True)
    questions(path, 60, "xq zj")
    report = convert(tiny, recipe, tmp_path / "out", calibration=some_text, quiet=True)
    (tried,) = report["gate"]["tries"]
    (result,) = tried["tasks"]
    assert (result["base_score"], result["score"], result["questions"]) == (0.5, 0.5, 60)
    assert result["interval"][0] > -0.1
    assert str(tmp_path) not in json.dumps(report)
    path.unlink()
    with pytest.raises(CalibrationError, match=r"q\.jsonl: no such file"):
        convert(tiny, recipe, tmp_path / "out", calibration=some_text, quiet=True)


def test_without_text_the_model_is_judged_on_its_own(tiny: Path, tmp_path: Path) -> None:
    """A recipe that needs no calibration needs text to be judged by."""
    block = gated(8, {"kl": 0.01}) | {"calibration": {"samples": 1, "length": 16, "held_out": 20}}
    report = convert(tiny, block, tmp_path / "out", quiet=True)
    assert report["gate"]["tries"][0]["accepted"]
    assert report["held_out"]["sequences"] == 20


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"accept": {}}, "expected kl, perplexity_increase, top1, task"),
        ({"accept": {"kl": 0}}, "kl is 0, expected a number more than 0"),
        ({"accept": {"top1": "100%"}}, "top1 is 1.0, expected a share between 0 and 1"),
        ({"accept": {"ppl": 1}}, "accept: unknown key 'ppl'"),
        ({"accept": {"task": {"file": "q.txt", "drop": 0.1}}}, "file is 'q.txt'"),
        ({"accept": {"task": {"file": "q.jsonl"}}}, "accept: task: missing key 'drop'"),
        ({"accept": None}, "fallback needs `accept`"),
        ({"fallback": "int8"}, "fallback is 'int8', expected a list"),
        ({"fallback": ["int9"]}, "fallback[0]: recipe 'int9': neither a file nor a recipe name"),
        ({"fallback": [gated(8, {"kl": 1})]}, "fallback[0]: a fallback has no accept"),
        ({"fallback": [3]}, "fallback[0] is 3, expected a recipe's name, file or mapping"),
        ({"calibration": {"held_out": 8}}, "held_out is 8, expected 20 or more"),
        ({"acept": {"kl": 1}}, "unknown key 'acept'; did you mean 'accept'?"),
    ],
)
def test_what_a_gate_cannot_be_is_one_line(change: dict[str, Any], words: str) -> None:
    block = gated(2, {"kl": 0.05}, "int8") | change
    with pytest.raises(RecipeError) as caught:
        load_staged(block)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_fallbacks_share_the_text_and_sequences_are_held_out_unasked() -> None:
    block = gated(2, {"kl": 0.05}, "int8") | {"calibration": {"samples": 8}}
    staged = load_staged(block)
    assert [one.calibration.held_out for one in staged.candidates] == [32, 32]
    assert [one.calibration.samples for one in staged.candidates] == [8, 8]
    assert staged.sha256 != load_staged(gated(2, {"kl": 0.06}, "int8")).sha256


def verdict(low: float, value: float, high: float, n: int = 32, side: str = "above") -> Verdict:
    return Verdict("kl", value, low, high, 0.05, side, n, "held-out sequences", ".4g")


def test_the_interval_decides_not_the_mean() -> None:
    assert verdict(0.01, 0.02, 0.049).state == WITHIN
    assert verdict(0.051, 0.06, 0.07).state == BEYOND
    near = verdict(0.04, 0.045, 0.055)
    assert near.state == UNDECIDED
    assert near.line().endswith("32 held-out sequences are too few to tell, about 262 may do")
    assert verdict(0.04, 0.052, 0.06).line().endswith("too few to tell")  # no number would do
    assert verdict(0.01, 0.02, 0.03, n=19).state == UNDECIDED
    assert verdict(0.051, 0.06, 0.07, side="below").state == WITHIN
    assert verdict(0.01, 0.02, 0.03, side="below").state == BEYOND
    lost = Verdict("kl", None, None, None, 0.05, "above", 32, "held-out sequences", ".4g")
    assert (lost.state, lost.line()) == (BEYOND, "kl is not finite")


def test_the_layers_named_are_those_with_the_largest_errors() -> None:
    errors = {"0": 0.1, "1": 0.5, "2": 0.3, "3": 0.2}
    modules = {
        f"model.layers.{i}.{kind}": {"output_error": error * scale, "weight_error": 0.1}
        for i, error in errors.items()
        for kind, scale in (("up", 1), ("down", 0.5))
    }
    said = costliest(modules)
    assert "error of the outputs in layers 1 (0.38), 2 (0.22), 3 (0.15)" in said
    assert said.endswith("and in up of layer 1 (0.5)")
    assert costliest({"lm_head": {"weight_error": 0.1}}) == ""


def test_candidates_are_planned_before_any_work(tiny: Path, tmp_path: Path) -> None:
    bad = packing(4) | {"modules": [{"match": "re:.*q_proj", "format": "w"}]}
    with pytest.raises(RecipeError, match="q_proj"):
        convert(tiny, gated(8, {"kl": 1}, bad), tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()
