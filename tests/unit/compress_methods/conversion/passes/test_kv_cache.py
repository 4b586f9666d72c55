"""Scales for an FP8 cache of keys and values: those that the text needs, stored, exported, let go
of again, and what such a cache loses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from compress_methods import convert
from compress_methods.checkpoint.compressed import open_compressed, read_entries
from compress_methods.checkpoint.loading.kv_cache import (
    at_attention,
    cut_e4m3,
    read_scales,
    round_e4m3,
    rounded_cache,
)
from compress_methods.checkpoint.loading.model import load_model
from compress_methods.checkpoint.safetensors import read_tensors, write_tensors
from compress_methods.conversion.job import check_calibration
from compress_methods.conversion.planning.calibration import settings_of
from compress_methods.conversion.stages import open_stages
from compress_methods.errors import CheckpointError, RecipeError
from compress_methods.evaluation.offline import all_logits
from compress_methods.recipe.stages import load_staged
from vllm_compress import cli

RECIPE: dict[str, Any] = {
    "formats": {"w8": {"format": "integer", "bits": 8, "group_size": -1}},
    "modules": [{"match": "blocks", "format": "w8"}],
    "calibration": {"samples": 4, "length": 48, "held_out": 2},
    "kv_cache": "fp8",
}
FILE = "kv_cache.safetensors"


@pytest.fixture(scope="module")
def made(novels_8m: Path, some_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("kv") / "out"
    convert(novels_8m, RECIPE, out, calibration=some_text, quiet=True)
    return out


def test_scales_reach_the_largest_that_a_cache_would_hold(
    made: Path, novels_8m: Path, some_text: Path
) -> None:
    """Against transformers' own cache, after the same text."""
    settings = settings_of(open_stages(novels_8m, load_staged(RECIPE)))
    tokens = check_calibration(novels_8m, settings, some_text).tokens
    assert tokens is not None
    cache = load_model(made)(input_ids=tokens, use_cache=True).past_key_values
    scales = read_scales(made)
    assert len(scales) == 3 * 8
    for number, layer in enumerate(cache.layers):
        for leaf, held in (("k_scale", layer.keys), ("v_scale", layer.values)):
            scale = scales[f"model.layers.{number}.self_attn.{leaf}"]
            wanted = float(held.abs().amax()) / 448
            assert wanted * (1 - 1e-5) <= scale <= wanted * (1 + 2**-7)
            assert torch.tensor(scale).bfloat16().float() == torch.tensor(scale)


def test_commands_know_them(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = json.loads((made / "report.json").read_text())
    assert report["bytes_after"] == sum(e.nbytes for e in read_entries(made).values())
    assert cli.main(["check", str(made), "--json"]) == 0
    assert "serve with --kv-cache-dtype fp8" in json.loads(capsys.readouterr().out)["kv_cache"]
    assert cli.main(["inspect", str(made), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    first = [read_scales(made)[f"model.layers.0.self_attn.{q}_scale"] for q in "qkv"]
    assert shown["kv_cache"]["model.layers.0.self_attn"] == first
    assert not any("self_attn" in name and "proj" not in name for name in shown["modules"])
    plan = ["plan", str(made), "--hardware", "l4", "--rate", "1/s", "--context", "256"]
    plan += ["--input", "90", "--output", "90", "--json"]
    sizes = []
    for kind, said in (("auto", "--kv-cache fp8 plans one of half"), ("fp8", "serve with --kv")):
        assert cli.main([*plan, "--kv-cache", kind]) == 0
        found = json.loads(capsys.readouterr().out)
        sizes.append(found["kv_bytes_per_token"])
        assert any(said in note for note in found["notes"])
    assert sizes[0] == 2 * sizes[1], "scales alone halve nothing"


def test_what_a_cache_loses_is_told(
    made: Path, novels_8m: Path, some_text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["eval", str(made), "--against", str(novels_8m), "--text", str(some_text), "--quiet"]
    common += ["--tokens", "300", "--length", "64", "--json"]
    losses = []
    for kind in ("auto", "fp8", "fp8-cpu"):
        assert cli.main([*common, "--kv-cache", kind]) == 0
        losses.append(json.loads(capsys.readouterr().out)["kl"])
    assert losses[0] < losses[1] < losses[2] < 0.05
    assert cli.main(["eval", str(novels_8m), *common[2:], "--kv-cache", "fp8"]) == 2
    assert "has no scales for an FP8 KV cache" in capsys.readouterr().err
    model, tokens = load_model(made), torch.arange(5, 40)
    plain = all_logits(model, tokens)
    coarse = {name: 100 * scale for name, scale in read_scales(made).items()}
    with rounded_cache(model, coarse):
        assert not torch.allclose(all_logits(model, tokens), plain, atol=0.01)
    assert torch.equal(all_logits(model, tokens), plain), "no longer rounded"


def test_other_models_are_left_alone(made: Path) -> None:
    one, other = load_model(made), load_model(made)
    tokens = torch.arange(5, 20)
    plain = all_logits(other, tokens)
    with at_attention(one, lambda module, q, k, v: (q, 0 * k, 0 * v)):
        assert torch.equal(all_logits(other, tokens), plain)
        assert not torch.equal(all_logits(one, tokens), plain)


def test_rounding_is_torchs() -> None:
    x = torch.randn(1000) * 3
    expected = (x / 0.02).clamp(-448, 448).to(torch.float8_e4m3fn).float() * 0.02
    assert torch.equal(round_e4m3(x, 0.02), expected)


def test_cutting_takes_the_next_value_towards_zero() -> None:
    every = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    x = torch.cat([torch.randn(1000) * 100, torch.randn(200) * 2**-7, torch.tensor([600.0, 0.0])])
    places = torch.searchsorted(every, x.abs(), right=True) - 1
    assert torch.equal(cut_e4m3(x, 1.0).abs(), every[places])
    assert bool((cut_e4m3(x, 1.0) * x >= 0).all())
    assert torch.equal(cut_e4m3(x * 0.25, 0.25), 0.25 * cut_e4m3(x, 1.0))


def test_an_export_declares_them_as_vllm_reads_it(
    novels_8m: Path, some_text: Path, tmp_path: Path
) -> None:
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
        CompressedTensorsKVCacheMethod,
    )

    out = tmp_path / "out"
    command = ["convert", str(novels_8m), "--recipe", str(tmp_path / "r.yaml"), "-o", str(out)]
    (tmp_path / "r.yaml").write_text(json.dumps(RECIPE))
    command += ["--calibration", str(some_text), "--quiet", "--export", "compressed-tensors"]
    assert cli.main(command) == 0
    block = json.loads((out / "config.json").read_text())["quantization_config"]
    CompressedTensorsKVCacheMethod.validate_kv_cache_scheme(block["kv_cache_scheme"])
    assert "model.layers.7.self_attn.v_scale" in read_entries(out)


def test_a_result_without_a_cache_has_no_scales_of_its_source(made: Path, tmp_path: Path) -> None:
    again = {key: value for key, value in RECIPE.items() if key != "kv_cache"}
    report = convert(made, {**again, "calibration": {"held_out": 0}}, tmp_path / "out", quiet=True)
    assert not [name for name in read_entries(tmp_path / "out") if name.endswith("_scale")]
    assert "model.layers.0.self_attn.k_scale" in report["dropped"]


def test_a_scale_that_is_lost_is_named(made: Path, tmp_path: Path) -> None:
    broken = tmp_path / "out"
    shutil.copytree(made, broken)
    tensors = read_tensors(broken / FILE)
    lost = tensors.pop("model.layers.3.self_attn.v_scale")
    write_tensors(broken / FILE, tensors)
    index = json.loads((broken / "model.safetensors.index.json").read_text())
    del index["weight_map"]["model.layers.3.self_attn.v_scale"]
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"layers\.3\.self_attn\.v_scale is missing"):
        open_compressed(broken)
    assert lost.shape == (1,)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kv_cache": "int8"}, "kv_cache is 'int8', expected fp8"),
        ({"kv_cash": "fp8"}, "did you mean 'kv_cache'"),
    ],
)
def test_what_is_no_cache_is_named(
    novels_8m: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(RecipeError, match=words):
        convert(novels_8m, {**RECIPE, **changes}, tmp_path / "out", quiet=True)
