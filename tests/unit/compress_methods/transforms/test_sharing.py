"""Layers that share matrices: which ones, what is stored, what is refused."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import compress_methods
from compress_methods import convert
from compress_methods.checkpoint.compressed import open_compressed
from compress_methods.checkpoint.loading.model import load_model
from compress_methods.errors import RecipeError
from compress_methods.evaluation.streamed import StreamedModel
from compress_methods.transforms.sharing import Sharing, divide

INT8 = {"format": "integer", "bits": 8, "group_size": -1}
INT4 = {"format": "integer", "bits": 4, "group_size": 64}
WHOLE = {"format": "dense", "dtype": "bfloat16"}
SMALL = {"samples": 4, "length": 64, "held_out": 2}
RTN = {"match": "blocks", "format": "w", "algorithm": "rtn"}


def recipe(*modules: dict[str, Any], stages: Any = (), **sharing: Any) -> dict[str, Any]:
    packing = {"formats": {"w": INT8, "v": INT4, "whole": WHOLE}, "modules": list(modules or [RTN])}
    stages = [*stages, {"transform": "sharing", **sharing}, packing]
    return {"stages": stages, "calibration": SMALL}


def run(model: Path, out: Path, what: dict[str, Any], text: Path) -> dict[str, Any]:
    return convert(model, what, out, calibration=text, device="cpu", quiet=True)


def all_ways(distances: list[list[float]], runs: int) -> float:
    """The least sum, found by trying every cut and every layer of every run."""
    count, found = len(distances), []
    for cuts in itertools.combinations(range(1, count), runs - 1):
        bounds = list(itertools.pairwise([0, *cuts, count]))
        found.append(
            sum(
                min(sum(distances[i][k] for i in range(a, b)) for k in range(a, b))
                for a, b in bounds
            )
        )
    return min(found)


@given(st.integers(1, 7), st.integers(1, 3), st.data())
def test_runs_are_those_of_least_sum(count: int, reach: int, data: st.DataObject) -> None:
    distances = [[math.inf] * count for _ in range(count)]
    for i, k in itertools.product(range(count), repeat=2):
        if abs(i - k) <= reach:
            distances[i][k] = 0.0 if i == k else float(data.draw(st.integers(1, 50)))
    runs = data.draw(st.integers(math.ceil(count / (2 * reach + 1)), count))
    sources = divide(distances, runs)
    assert len(set(sources)) == runs
    assert all(sources[source] == source for source in sources)
    assert sources == sorted(sources)
    assert sum(distances[i][k] for i, k in enumerate(sources)) == all_ways(distances, runs)


def test_shared_layers_are_stored_once_and_are_alike_everywhere(
    novels_8m: Path, some_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of runs whose last layer is kept, which is stored as the first."""
    out = tmp_path / "out"
    survey = Sharing.survey

    def as_if(self: Sharing, part: Any) -> list[float]:
        near = [i - part.index for i in range(8) if 0 < abs(i - part.index) <= 2]
        assert len(survey(self, part)) == len(near)
        far = part.index not in (3, 4, 5)
        return [0.1 * abs(step) + 0.05 * (step < 0) + far for step in near]

    monkeypatch.setattr(Sharing, "survey", as_if)
    report = run(novels_8m, out, recipe(share=2), some_text)
    sources = report["stages"][0]["sources"]
    assert sources == [0, 1, 2, 4, 4, 6, 6, 7]
    checkpoint = open_compressed(out)
    assert len(checkpoint.matrices) == 6 * 7
    assert len(checkpoint.held) == 8 * 7
    assert report["bytes_after"] == sum(
        entry.nbytes
        for entries in (*(m.entries for m in checkpoint.matrices.values()), checkpoint.dense)
        for entry in entries.values()
    )
    loaded, original = load_model(out), load_model(novels_8m)
    for layer, source in enumerate(sources):
        mine, theirs = loaded.model.layers[layer], original.model.layers[source]
        own = original.model.layers[layer].input_layernorm.weight
        assert torch.equal(mine.input_layernorm.weight, own)
        for name, weight in theirs.named_parameters():
            if weight.dim() == 2:
                error = (mine.get_parameter(name) - weight).abs().max() / weight.abs().max()
                assert error < 0.005
    same_everywhere(out, loaded, report)


def same_everywhere(out: Path, loaded: Any, report: dict[str, Any]) -> None:
    """transformers' own loader and the streamed evaluation compute what `load_model` does."""
    from transformers import AutoModelForCausalLM

    assert compress_methods
    plain = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    tokens = list(range(2, 40))
    streamed = dict(StreamedModel(out, torch.device("cpu")).logits([tokens]))[0]
    with torch.no_grad():
        expected = loaded(torch.tensor([tokens])).logits[0]
        torch.testing.assert_close(plain(torch.tensor([tokens])).logits[0], expected)
    torch.testing.assert_close(streamed, expected, atol=1e-4, rtol=1e-4)
    assert 0.01 < report["held_out"]["kl"] < 3


@pytest.mark.parametrize("rule", [{"format": "v", "algorithm": "gptq"}, {"format": "whole"}])
def test_the_plan_knows_the_bytes_before_anything_is_measured(
    novels_8m: Path, some_text: Path, tmp_path: Path, rule: dict[str, str]
) -> None:
    from compress_methods.conversion.stages import open_stages
    from compress_methods.recipe.stages import load_staged

    what = recipe({**RTN, **rule}, share="25%", reach=1)
    (stage,) = open_stages(novels_8m, load_staged(what), tensor_parallel_size=2)
    report = run(novels_8m, tmp_path / "out", what, some_text)
    assert report["bytes_after"] == stage.planned.plan.compressed_bytes
    shared = open_compressed(tmp_path / "out").shared
    assert len(shared) == 2 * 7
    assert len(report["dropped"]) == 2 * 7
    assert set(report["dropped"].values()) == {
        f"shared with {owner}, stored once" for owner in shared.values()
    }


def test_a_killed_conversion_decides_the_same(
    novels_8m: Path, some_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(novels_8m, tmp_path / "whole", recipe(), some_text)
    visit = Sharing.visit

    def killed(self: Sharing, part: Any) -> None:
        if part.index == 4:
            raise KeyboardInterrupt
        visit(self, part)

    with monkeypatch.context() as patched:
        patched.setattr(Sharing, "visit", killed)
        with pytest.raises(KeyboardInterrupt):
            run(novels_8m, tmp_path / "out", recipe(), some_text)
    monkeypatch.delattr(Sharing, "survey")
    again = run(novels_8m, tmp_path / "out", recipe(), some_text)
    for report in (whole, again):
        del report["files"]["README.md"]  # says how long it took
    assert again["files"] == whole["files"]


def test_layers_after_others_were_dropped(novels_8m: Path, some_text: Path, tmp_path: Path) -> None:
    stages = [{"transform": "depth", "drop": 2}]
    report = run(novels_8m, tmp_path / "out", recipe(stages=stages, share=1), some_text)
    assert len(report["stages"][1]["sources"]) == 6
    assert len(open_compressed(tmp_path / "out").matrices) == 5 * 7


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ({"stages": [{"transform": "sharing"}]}, "no packing follows in its sweep"),
        (recipe(share=0.1), r"sharing: share is 10.0% of 8 layers, less than one"),
        (recipe(share=6, reach=1), r"share is 6 of 8 layers; with a reach of 1 at most 5 can"),
        (recipe(share=1.5), "expected a share below 1 or a whole number"),
        (recipe(reach=0), "reach is 0, expected a whole number from 1"),
        (recipe({**RTN, "match": "re:.*mlp.*"}), "q_proj is kept as it is.*add a rule for it"),
        (
            recipe({**RTN, "match": r"re:.*\.2\..*", "format": "v"}, RTN),
            r"layers\.2\.self_attn.q_proj is int4 g64 .*in another layer it is int8",
        ),
        (
            recipe({**RTN, "format": ["w", "v"]}),
            "several formats to choose from",
        ),
        (
            recipe(stages=[{"transform": "smoothquant"}]),
            "sharing: layers that share matrices cannot be changed.*leave out smoothquant",
        ),
    ],
)
def test_what_cannot_be_shared_is_refused_before_any_work(
    what: dict[str, Any], message: str, novels_8m: Path, some_text: Path, tmp_path: Path
) -> None:
    if "several" in message:
        what["stages"][-1]["budget"] = {"bits": 5}
    with pytest.raises(RecipeError, match=message):
        run(novels_8m, tmp_path / "out", {"calibration": SMALL, **what}, some_text)


def test_experts_are_refused() -> None:
    expert = SimpleNamespace(kind="experts")
    model: Any = SimpleNamespace(slots={"model.layers.0.mlp.experts.0.up_proj": expert})
    with pytest.raises(RecipeError, match="layers of experts cannot share"):
        Sharing().plan(model)
