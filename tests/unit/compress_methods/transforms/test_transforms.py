"""Pruning of layers and widths: exact algebra against the original with the same parts zeroed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from compress_methods import convert
from compress_methods.checkpoint.compressed import read_entries
from compress_methods.checkpoint.loading.model import load_model
from compress_methods.errors import RecipeError
from compress_methods.model.architecture import prunable_types
from compress_methods.transforms.columns import DAMPING, drop_units
from compress_methods.transforms.depth import Depth
from compress_methods.transforms.width import Width
from tests.e2e.support.tiny import make_model

SMALL = {"samples": 4, "length": 64, "held_out": 2}
HALF = {"transform": "width", "ffn": 0.5, "attention": "50%", "multiple": 32, "tensor_parallel": 1}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("Llama", {}),
    "Llama with every bias": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "wide heads, one query each, tied": (
        "Llama",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 48,
            "tie_word_embeddings": True,
        },
    ),
    "four queries to a KV head": ("Qwen3", {"num_attention_heads": 8}),
    "Qwen2": ("Qwen2", {}),
    "Qwen3": ("Qwen3", {}),
    "Mistral, three of four groups": (
        "Mistral",
        {"num_attention_heads": 8, "num_key_value_heads": 4},
    ),
}


def tiny(kind: str, folder: Path, novels_8m: Path, **changes: Any) -> Path:
    """A random model with a tokenizer."""
    model = make_model(kind, folder, vocab_size=4096, **changes)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(novels_8m / name, model)
    return model


def prune(model: Path, out: Path, text: Path, *stages: dict[str, Any]) -> dict[str, Any]:
    recipe = {"stages": list(stages), "calibration": SMALL}
    return convert(model, recipe, out, calibration=text, quiet=True)


def logits(model: nn.Module) -> Tensor:
    tokens = torch.randint(2, 4000, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found: Tensor = model(input_ids=tokens, use_cache=False).logits
    return found


def stays(old: Tensor, new: Tensor) -> Tensor:
    """Which rows of `old` are among those of `new`: bool [rows]."""
    return (old[:, None] == new[None]).all(-1).any(1)


@pytest.mark.parametrize("name", list(MODELS))
def test_without_compensation_it_is_the_original_with_those_parts_zeroed(
    name: str, novels_8m: Path, some_text: Path, tmp_path: Path
) -> None:
    kind, changes = MODELS[name]
    model = tiny(kind, tmp_path / "model", novels_8m, **changes)
    width = {**HALF, "compensate": False}
    if name.startswith("Mistral"):
        width["attention"] = "25%"
    prune(model, tmp_path / "out", some_text, width)
    original, pruned = load_model(model), load_model(tmp_path / "out")
    assert pruned.config.intermediate_size == original.config.intermediate_size // 2
    groups = original.config.num_key_value_heads
    kept = {"Qwen2": groups, "Mistral": 3}.get(kind, groups // 2)
    assert pruned.config.num_key_value_heads == kept
    for old, new in zip(original.model.layers, pruned.model.layers, strict=True):
        for parts, rows, columns in (
            ("mlp", "gate_proj", "down_proj"),
            ("self_attn", "q_proj", "o_proj"),
        ):
            before, after = old.get_submodule(parts), new.get_submodule(parts)
            left = stays(getattr(before, rows).weight, getattr(after, rows).weight)
            matrix = getattr(before, columns).weight.data
            assert torch.equal(matrix[:, left], getattr(after, columns).weight)
            matrix[:, ~left] = 0
    assert torch.allclose(logits(original), logits(pruned), atol=2e-5)


def test_compensation_loses_less_than_none(
    novels_8m: Path, some_text: Path, tmp_path: Path
) -> None:
    kl = {}
    for compensate in (True, False):
        stage = {**HALF, "multiple": 128, "tensor_parallel": 2, "compensate": compensate}
        report = prune(novels_8m, tmp_path / str(compensate), some_text, stage)
        kl[compensate] = report["held_out"]["kl"]
    assert kl[True] < 0.6 * kl[False]


def test_dropping_nothing_is_identity(novels_8m: Path, some_text: Path, tmp_path: Path) -> None:
    nothing = ({"transform": "depth", "drop": 0}, {"transform": "width", "ffn": 0})
    report = prune(novels_8m, tmp_path / "out", some_text, *nothing)
    before, after = read_entries(novels_8m), read_entries(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name].read(), after[name].read()) for name in before)
    configs = [json.loads((p / "config.json").read_text()) for p in (novels_8m, tmp_path / "out")]
    assert configs[0] == configs[1]
    assert report["held_out"]["kl"] == pytest.approx(0, abs=1e-6)
    assert report["dropped"] == {}


def test_depth_drops_the_layers_that_change_their_input_least_and_keeps_the_order(
    novels_8m: Path, some_text: Path, tmp_path: Path
) -> None:
    from compress_methods.calibration.tokenizer import load_tokenizer
    from compress_methods.calibration.tokens import CalibrationSettings, load_tokens

    report = prune(novels_8m, tmp_path / "out", some_text, {"transform": "depth", "drop": 3})
    original = load_model(novels_8m)
    tokens = load_tokens(some_text, load_tokenizer(novels_8m), CalibrationSettings(**SMALL))
    captured: list[tuple[Tensor, Tensor]] = []
    for layer in original.model.layers:
        layer.register_forward_hook(
            lambda _, inputs, out: captured.append((inputs[0], out if out.dim() else out[0]))
        )
    with torch.no_grad():
        original(input_ids=tokens[: SMALL["samples"]])
    expected = [1 - torch.cosine_similarity(a, b, dim=-1).mean().item() for a, b in captured]
    stage = report["stages"][0]
    assert stage["influence"] == pytest.approx(expected, abs=1e-5)
    least = sorted(range(8), key=lambda i: expected[i])[:3]
    assert stage["layers"] == [i for i in range(8) if i not in least]
    before, after = read_entries(novels_8m), read_entries(tmp_path / "out")
    for new, old in enumerate(stage["layers"]):
        name = "model.layers.{}.mlp.up_proj.weight"
        assert torch.equal(before[name.format(old)].read(), after[name.format(new)].read())
    assert {name for name in before if any(f".layers.{i}." in name for i in least)} == set(
        report["dropped"]
    )


def test_without_some_layers_it_is_the_original_that_passes_them_by(
    novels_8m: Path, some_text: Path, tmp_path: Path
) -> None:
    """Layers of two kinds, so that each has to keep its own; a chain, so that it has to twice."""
    changes = {"use_sliding_window": True, "sliding_window": 8, "num_hidden_layers": 6}
    types = ["sliding_attention", "full_attention"] * 3
    model = tiny("Qwen2", tmp_path / "model", novels_8m, **changes, layer_types=types)
    stage = {"transform": "depth", "drop": 2}
    report = prune(model, tmp_path / "out", some_text, stage, stage)
    left = list(range(6))
    for told in report["stages"]:
        left = [left[i] for i in told["layers"]]
    original, pruned = load_model(model), load_model(tmp_path / "out")
    assert pruned.config.layer_types == [types[i] for i in left]
    for index, layer in enumerate(original.model.layers):
        if index not in left:
            layer.forward = lambda states, *_, **__: states
    assert torch.allclose(logits(original), logits(pruned), atol=2e-5)


@given(st.integers(0, 10_000), st.sampled_from([1, 4]), st.integers(1, 7))
def test_what_stays_is_the_least_squares_solution_on_it(seed: int, unit: int, kept: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    units = 8
    x = torch.randn(400, units * unit, generator=draw) @ torch.randn(
        units * unit, units * unit, generator=draw
    )
    weight = torch.randn(12, units * unit, generator=draw)
    hessian = x.T @ x / len(x)
    columns, values = drop_units(weight, hessian, unit, kept, compensate=True)
    assert len(columns) == kept * unit
    # Reference: the damping is a few more tokens on which the kept columns are to stay as they are.
    extra = (DAMPING * hessian.diagonal().mean() * len(x)).sqrt() * torch.eye(units * unit)
    rows = torch.cat([x, extra]).double()
    target = rows @ weight.T.double()
    expected = torch.linalg.lstsq(rows[:, columns], target, driver="gelsd").solution.T
    assert torch.allclose(values.double(), expected, atol=1e-3, rtol=1e-3)


@given(st.integers(0, 10_000), st.sampled_from([1, 3]), st.booleans())
def test_the_unit_that_goes_is_the_one_whose_loss_is_least(
    seed: int, unit: int, compensate: bool
) -> None:
    draw = torch.Generator().manual_seed(seed)
    cols = 6 * unit
    x = torch.randn(200, cols, generator=draw) @ torch.randn(cols, cols, generator=draw)
    weight = torch.randn(5, cols, generator=draw)
    hessian = x.T @ x / len(x)
    columns, _ = drop_units(weight, hessian, unit, 5, compensate=compensate)
    damped = hessian + DAMPING * hessian.diagonal().mean() * torch.eye(cols) * compensate
    losses = []
    for gone in range(6):
        left = torch.ones(cols, dtype=torch.bool)
        left[gone * unit : (gone + 1) * unit] = False
        new = weight * left
        if compensate:
            new[:, left] = torch.linalg.solve(damped[left][:, left], damped[left] @ weight.T).T
        difference = weight - new
        losses.append(float(((difference @ damped) * difference).sum()))
    expected = min(range(6), key=losses.__getitem__)
    gone = next(u for u in range(6) if u * unit not in columns.tolist())
    assert gone == expected or losses[gone] == pytest.approx(losses[expected], rel=1e-3)


@pytest.mark.parametrize("kind", ["Gemma3Text", "Phi3", "OPT", "GPT2"])
@pytest.mark.parametrize("stage", [{"transform": "depth", "drop": 1}, HALF])
def test_other_families_are_refused_in_one_line(
    kind: str, stage: dict[str, Any], novels_8m: Path, some_text: Path, tmp_path: Path
) -> None:
    model = tiny(kind, tmp_path / "model", novels_8m)
    with pytest.raises(RecipeError, match="cannot be pruned, only " + ", ".join(prunable_types())):
        prune(model, tmp_path / "out", some_text, stage)
    assert not (tmp_path / "out").exists()


BAD_STAGES: list[tuple[dict[str, Any], str]] = [
    ({"transform": "depth", "drop": 8}, r"drop is 8 layers, the model has 8"),
    ({"transform": "depth", "drop": 2.5}, r"drop is 2.5, expected a share below 1 or a whole"),
    ({"transform": "depth", "drop": -1}, r"drop is -1"),
    ({"transform": "depth", "drop": "10%"}, r"drop is 10.0% of 8 layers, less than one"),
    ({"transform": "depth", "drop": "a lot"}, r"drop is 'a lot', expected float"),
    ({"transform": "depth", "choose": "end"}, r"unknown choose 'end'; did you mean 'ends'"),
    ({"transform": "depth", "keep": [3, 1]}, r"keep is \[3, 1\], expected numbers from 0, asc"),
    ({"transform": "depth", "keep": [1, 8]}, r"keep names layer 8, the model has 0 to 7"),
    ({"transform": "dept"}, r"unknown transform 'dept'; did you mean 'depth'"),
    ({"transform": "width", "fnn": 0.5}, r"unknown key 'fnn'; did you mean 'ffn'"),
    ({"transform": "width", "ffn": "100%"}, r"ffn is 1.0, expected a share from 0 below 1"),
    ({"transform": "width", "ffn": 0.1}, r"nothing would be dropped of 768 channels in steps of"),
    ({"transform": "width", "ffn": 0, "attention": 0.5}, r"nothing would be dropped .* 2 KV heads"),
    ({"transform": "width", "multiple": 0}, r"multiple is 0"),
]


@pytest.mark.parametrize(("stage", "words"), BAD_STAGES)
def test_what_cannot_be_pruned_is_one_line_and_writes_nothing(
    stage: dict[str, Any], words: str, novels_8m: Path, some_text: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=words) as caught:
        prune(novels_8m, tmp_path / "out", some_text, stage)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


class Shape:
    """A model's numbers, as transformers' config has them."""

    def __init__(self, **values: Any) -> None:
        self.model_type = "mistral"
        self.hidden_size, self.intermediate_size, self.head_dim = 4096, 14336, 128
        self.num_attention_heads, self.num_key_value_heads = 32, 8
        self.__dict__.update(values)


def test_widths_are_rounded_up_to_what_hardware_and_loaders_like() -> None:
    quarter = Width(ffn=0.25, attention=0.25)
    assert quarter.changes(Shape())["intermediate_size"] == 10752
    assert quarter.changes(Shape(intermediate_size=11008))["intermediate_size"] == 8320
    assert "num_key_value_heads" not in quarter.changes(Shape())
    two = Width(ffn=0.25, attention=0.25, tensor_parallel=2)
    assert two.changes(Shape())["num_key_value_heads"] == 6
    assert two.changes(Shape())["num_attention_heads"] == 24
    assert "num_key_value_heads" not in two.changes(Shape(model_type="llama"))
    half = Width(ffn=0, attention=0.5)
    assert half.changes(Shape(model_type="llama"))["num_key_value_heads"] == 4
    with pytest.raises(RecipeError, match="nothing would be dropped"):
        half.changes(Shape(model_type="qwen2"))
    with pytest.raises(RecipeError, match="32 attention heads are no multiple of 7 KV heads"):
        half.changes(Shape(num_key_value_heads=7))


def test_no_more_layers_go_than_were_asked_for() -> None:
    assert len(Depth(drop=0.25).layers(30)) == 23
    assert len(Depth(drop=0.1).layers(10)) == 9
    assert len(Depth(drop=3).layers(10)) == 7


def test_layers_stay_by_their_place() -> None:
    assert Depth(drop=0.5, choose="evenly").layers(8) == [0, 2, 5, 7]
    assert Depth(drop=7, choose="evenly").layers(8) == [0]
    assert Depth(drop=0.5, choose="ends").layers(8) == [0, 1, 6, 7]
    assert Depth(drop=3, choose="ends").layers(8) == [0, 1, 2, 6, 7]
    assert Depth(keep=[1, 4]).layers(8) == [1, 4]
