"""Scales and rotations: the function stays, and 8-bit activations survive outliers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress_methods import convert
from compress_methods.checkpoint.compressed import read_entries
from compress_methods.checkpoint.loading.model import load_model
from compress_methods.errors import RecipeError
from compress_methods.formats import format_from_dict
from compress_methods.transforms.awq import Awq
from compress_methods.transforms.folding.orthogonal import Orthogonal
from compress_methods.transforms.folding.search import bounded
from compress_methods.transforms.smoothquant import SmoothQuant
from tests.benchmarks.loss.outliers import CHANNEL, inject
from tests.e2e.support.tiny import make_model
from tests.e2e.support.zoo import ZOO

SMALL = {"samples": 8, "length": 64, "held_out": 2}
W8A8 = {"format": "integer", "bits": 8, "group_size": -1, "activations": "int8"}
W4 = {"format": "integer", "bits": 4, "group_size": 64}
SMOOTH = {"transform": "smoothquant", "grid": 4}


def tiny(name: str, folder: Path, novels_8m: Path, **changes: Any) -> Path:
    """A random model of a family, norms' gains drawn too, with a tokenizer."""
    kind, config = ZOO[name]
    model = make_model(kind, folder, **{**config, "vocab_size": 4096, **changes})
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(novels_8m / file, model)
    return model


def run(model: Path, out: Path, text: Path, *stages: Any, fmt: Any = None) -> dict[str, Any]:
    packing = {"formats": {"w": fmt}, "modules": [{"match": "blocks", "format": "w"}]}
    recipe = {"stages": [*stages, *([packing] if fmt else [])], "calibration": SMALL}
    if not stages:
        recipe = {**packing, "calibration": SMALL}
    return convert(model, recipe, out, calibration=text, quiet=True)


def logits(model: nn.Module) -> Tensor:
    tokens = torch.randint(2, 4000, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found: Tensor = model(input_ids=tokens, use_cache=False).logits
    return found


SCALED = {
    "awq": ("llama-bias", "gemma3", "opt"),
    "smoothquant": ("qwen2", "gpt2", "bloom"),
}


@pytest.mark.parametrize(("transform", "name"), [(t, n) for t in SCALED for n in SCALED[t]])
def test_a_scaled_model_computes_what_the_original_does(
    transform: str, name: str, novels_8m: Path, some_text: Path, tmp_path: Path
) -> None:
    model = tiny(name, tmp_path / "model", novels_8m)
    run(model, tmp_path / "out", some_text, {"transform": transform, "alpha": 0.5})
    before, after = read_entries(model), read_entries(tmp_path / "out")
    assert sum(not torch.equal(before[n].read(), after[n].read()) for n in before) >= 8
    expected = logits(load_model(model))
    assert torch.allclose(expected, logits(load_model(tmp_path / "out")), atol=2e-4)


@pytest.mark.parametrize("name", ["llama-tied", "llama-bias", "phi3", "gemma"])
def test_a_turned_model_computes_what_the_original_does(
    name: str, novels_8m: Path, some_text: Path, tmp_path: Path
) -> None:
    model = tiny(name, tmp_path / "model", novels_8m)
    report = run(model, tmp_path / "out", some_text, {"transform": "rotation"})
    assert report["held_out"]["kl"] < 1e-5
    original, turned = load_model(model), load_model(tmp_path / "out")
    assert not turned.config.tie_word_embeddings
    mine = {n: p for n, p in turned.named_parameters() if p.dim() > 1}
    theirs = dict(original.named_parameters())
    assert not [n for n, p in mine.items() if n in theirs and torch.allclose(p, theirs[n])]
    assert torch.allclose(logits(original), logits(turned), atol=2e-4)


REFUSED = {
    "gemma3": "self_attn.q_proj reads the residual stream|scales the residual stream",
    "gpt2": "expected the gains of one norm between blocks and head, found transformer.wpe.weight",
    "olmo2": "q_norm scales the residual stream, or is read by more than matrices",
    "cohere": "model.norm is no RMS norm",
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_cannot_be_turned_is_refused_by_name(
    name: str, novels_8m: Path, some_text: Path, tmp_path: Path
) -> None:
    model = tiny(name, tmp_path / "model", novels_8m)
    with pytest.raises(RecipeError, match=REFUSED[name]) as caught:
        run(model, tmp_path / "out", some_text, {"transform": "rotation"})
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_int8_survives_outliers_after_smoothing_or_turning(
    novels_8m: Path, some_text: Path, tmp_path: Path
) -> None:
    model = inject(novels_8m, tmp_path / "model")
    before, after = logits(load_model(novels_8m)), logits(load_model(model))
    assert torch.allclose(before, after, atol=2e-3)
    kl = {}
    for name, source, stages in (
        ("plain", novels_8m, []),
        ("outliers", model, []),
        ("smooth", model, [SMOOTH]),
        ("turned", model, [{"transform": "rotation"}]),
    ):
        report = run(source, tmp_path / name, some_text, *stages, fmt=W8A8)
        kl[name] = report["held_out"]["kl"]
    assert kl["outliers"] > 5 * kl["plain"]
    assert kl["smooth"] < 1.3 * kl["plain"]
    assert kl["turned"] < 1.3 * kl["plain"]


@pytest.mark.slow
def test_awq_loses_less_than_rounding_alone(
    novels_8m: Path, some_text: Path, tmp_path: Path
) -> None:
    plain = run(novels_8m, tmp_path / "plain", some_text, fmt=W4)["held_out"]["kl"]
    report = run(novels_8m, tmp_path / "awq", some_text, {"transform": "awq", "grid": 4}, fmt=W4)
    assert report["held_out"]["kl"] < plain
    assert report["notes"] == {}


def test_layers_that_nothing_before_them_can_scale_are_named(
    novels_8m: Path, some_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny("gpt2", tmp_path / "model", novels_8m)
    packing = {"formats": {"w": W8A8}, "modules": [{"match": "blocks", "format": "w"}]}
    recipe = {"stages": [SMOOTH, packing], "calibration": SMALL}
    report = convert(model, recipe, tmp_path / "out", calibration=some_text)
    line = "smoothquant: no layer before it can take a scale"
    assert report["notes"] == {f"transformer.h.{i}.mlp.c_proj": line for i in (0, 1)}
    assert capsys.readouterr().err.count(f"transformer.h.*.mlp.c_proj: {line}") == 1


def test_nothing_to_search_for_is_one_line(
    novels_8m: Path, some_text: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=r"no packing follows in this sweep.*give alpha"):
        run(novels_8m, tmp_path / "out", some_text, SMOOTH)


def test_a_turn_comes_before_scales(novels_8m: Path, some_text: Path, tmp_path: Path) -> None:
    stages = ({"transform": "awq", "alpha": 0.5}, {"transform": "rotation"})
    with pytest.raises(RecipeError, match="rotation: has to come before awq"):
        run(novels_8m, tmp_path / "out", some_text, *stages)


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ({"transform": "awq", "alpha": 1.5}, "alpha is 1.5, expected a number from 0 to 1"),
        ({"transform": "smoothquant", "grid": 0}, "grid is 0, expected an integer from 1"),
        ({"transform": "rotation", "sed": 1}, "unknown key 'sed'; did you mean 'seed'"),
    ],
)
def test_bad_settings_are_one_line(
    stage: Any, words: str, novels_8m: Path, some_text: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=words):
        run(novels_8m, tmp_path / "out", some_text, stage)


def test_scales_are_the_papers() -> None:
    inputs, weights = torch.tensor([1.0, 16.0, 0.0]), torch.tensor([4.0, 1.0, 1.0])
    for method in (Awq(), SmoothQuant()):
        assert torch.allclose(method.factors(inputs, weights, 0.5)[:2], torch.tensor([0.5, 4.0]))
        assert torch.allclose(method.factors(inputs, weights, 1.0)[:2], inputs[:2])
    kept = bounded(torch.tensor([0.5, 2.0, 0.0]))
    assert torch.allclose(kept, torch.tensor([0.5, 2.0, 1.0]))


@pytest.mark.parametrize("size", [1, 2, 64, 96, 320, 45])
def test_turns_are_orthogonal_and_undone(size: int) -> None:
    turn = Orthogonal(size, seed=3)
    matrix = turn.turn(torch.eye(size, dtype=torch.float64))
    assert torch.allclose(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), atol=1e-12)
    x = torch.randn(5, size, dtype=torch.float64)
    assert torch.allclose(turn.turn_back(turn.turn(x)), x)
    assert torch.allclose(turn.turn(x), x @ matrix)
    if size == 64:
        assert torch.allclose(matrix.abs(), torch.full_like(matrix, 1 / 8))


def test_an_outlier_ends_up_where_the_format_can_hold_it(novels_8m: Path, tmp_path: Path) -> None:
    model = load_model(inject(novels_8m, tmp_path / "model"))
    peaks: list[Tensor] = []
    layer = model.model.layers[3].self_attn.q_proj
    layer.register_forward_pre_hook(lambda _, args: peaks.append(args[0].abs().amax((0, 1))))
    logits(model)
    others = peaks[0].clone()
    others[CHANNEL] = 0
    assert peaks[0][CHANNEL] > 10 * others.max()
    assert format_from_dict(W8A8).quantize_activations(peaks[0][None]).shape == (1, 256)
