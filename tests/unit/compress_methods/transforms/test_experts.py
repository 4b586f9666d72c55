"""Pruning of experts: a plain smaller mixture, which computes what the original does where its
router may choose only the experts that stay; those that stay are the salient ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from compress_methods import convert
from compress_methods.checkpoint.compressed import open_compressed, read_entries
from compress_methods.checkpoint.loading.model import load_model
from compress_methods.conversion.stages import open_stages
from compress_methods.errors import RecipeError
from compress_methods.recipe.stages import load_staged
from compress_methods.transforms import experts as passes
from compress_methods.transforms.experts import _kept
from tests.e2e.support.tiny import make_model
from tests.e2e.support.zoo import MIXTURES

LEFT_OUT = -1e9
LINEAR = torch.nn.functional.linear


def mixture(name: str, folder: Path, novels_8m: Path, **changes: Any) -> Path:
    kind, config = MIXTURES[name]
    model = make_model(kind, folder, **{**config, "vocab_size": 4096, **changes})
    for path in novels_8m.glob("tokenizer*"):
        shutil.copy(path, model)
    return model


def recipe(drop: Any, *stages: dict[str, Any]) -> dict[str, Any]:
    settings = {"samples": 4, "length": 64, "held_out": 2}
    return {
        "stages": [{"transform": "experts", "drop": drop}, *stages],
        "calibration": settings,
    }


def kept_in(report: dict[str, Any], count: int = 4) -> dict[str, list[int]]:
    """Numbers of the experts that stayed, by the name of their module."""
    found = {}
    for owner, line in report["notes"].items():
        numbers = line.removeprefix("experts ").removesuffix(" dropped").split(", ")
        found[owner] = [i for i in range(count) if str(i) not in numbers]
    return found


def without(router: Any, gone: list[int]) -> Any:
    """A router's `forward` in which some experts get no score worth a choice."""
    run = router.forward

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        out = LINEAR(x, weight, bias)
        out[..., gone] = LEFT_OUT
        return out

    def forward(*args: Any) -> Any:
        torch.nn.functional.linear = linear
        try:
            return run(*args)
        finally:
            torch.nn.functional.linear = LINEAR

    return forward


@torch.no_grad()
def restricted(model: Any, kept: dict[str, list[int]], ids: Tensor) -> Tensor:
    """Logits where routers choose only experts that were kept."""
    for owner, numbers in kept.items():
        mixture = model.get_submodule(owner.rpartition(".")[0])
        router = getattr(mixture, "gate", None) or mixture.router
        router.forward = without(router, [i for i in range(4) if i not in numbers])
    logits: Tensor = model(ids).logits
    return logits


@pytest.mark.parametrize(
    "name", ["mixtral", "qwen2_moe", "olmoe", "granitemoe", "llama4", "gpt_oss"]
)
def test_what_is_left_computes_as_if_the_rest_were_never_chosen(
    tmp_path: Path, name: str, novels_8m: Path, some_text: Path
) -> None:
    model = mixture(name, tmp_path / "m", novels_8m, num_hidden_layers=2)
    out = tmp_path / "out"
    report = convert(model, recipe(1), out, calibration=some_text, quiet=True)
    kept = kept_in(report)
    assert all(len(numbers) == 3 for numbers in kept.values())
    config = json.loads((out / "config.json").read_text())
    assert 3 in (config.get("num_experts"), config.get("num_local_experts"))
    assert "quantization_config" not in config
    smaller = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        found = smaller(ids).logits
    expected = restricted(load_model(model), kept, ids)
    assert torch.allclose(found, expected, atol=1e-4)
    planned = open_stages(model, load_staged(recipe(1)))[-1].planned.plan.compressed_bytes
    assert planned == report["bytes_after"] == sum(e.nbytes for e in read_entries(out).values())


def test_held_out_text_is_judged_with_what_is_left(
    tmp_path: Path, novels_8m: Path, some_text: Path
) -> None:
    """What is reported of the smaller model is what another conversion finds of its source."""
    model = mixture("mixtral", tmp_path / "m", novels_8m)
    report = convert(model, recipe("50%"), tmp_path / "out", calibration=some_text, quiet=True)
    packing = {
        "formats": {"w": {"format": "integer", "bits": 8, "group_size": -1}},
        "modules": [{"match": "blocks", "format": "w"}],
        "calibration": recipe(1)["calibration"],
    }
    again = convert(tmp_path / "out", packing, tmp_path / "8", calibration=some_text, quiet=True)
    found, expected = report["held_out"], again["held_out"]
    assert found["perplexity"] == pytest.approx(expected["base_perplexity"], rel=1e-4)
    assert found["perplexity"] != pytest.approx(found["base_perplexity"], rel=1e-3)


@pytest.mark.parametrize(
    ("name", "count"), [("deepseek_v3", 8), ("glm4_moe", 4), ("ernie4_5_moe", 4)]
)
def test_layers_without_experts_and_corrections_of_scores_are_kept(
    tmp_path: Path, name: str, count: int, novels_8m: Path, some_text: Path
) -> None:
    changes = {"n_routed_experts": count} if name == "deepseek_v3" else {}
    model = mixture(name, tmp_path / "m", novels_8m, **changes)
    asked = recipe(count // 2)
    report = convert(model, asked, tmp_path / "out", calibration=some_text, quiet=True)
    (kept,) = kept_in(report, count).values()
    assert len(kept) == count // 2
    if name == "deepseek_v3":  # each of two groups of four keeps two
        assert [i // 4 for i in kept] == [0, 0, 1, 1]
    smaller = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    whole = load_model(model)
    for parameter, tensor in smaller.state_dict().items():
        old = whole.state_dict()[parameter]
        if tensor.shape != old.shape:
            axis = old.shape.index(count)
            old = old.index_select(axis, torch.tensor(kept))
        assert torch.equal(tensor.float(), old), parameter


def test_the_least_salient_go(tmp_path: Path, novels_8m: Path, some_text: Path) -> None:
    """An expert of which nothing comes out has no part in any token."""
    from compress_methods.checkpoint.safetensors import read_tensors, write_tensors

    model = mixture("mixtral", tmp_path / "m", novels_8m)
    tensors = read_tensors(model / "model.safetensors")
    for layer, expert in ((0, 2), (1, 0)):
        tensors[f"model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight"] *= 1e-3
    write_tensors(model / "model.safetensors", tensors)
    report = convert(model, recipe(1), tmp_path / "out", calibration=some_text, quiet=True)
    assert list(kept_in(report).values()) == [[0, 1, 3], [1, 2, 3]]
    assert report["held_out"]["kl"] < 1.0


@pytest.mark.parametrize("gone", [3, 0])
def test_merging_puts_neurons_in_order_and_averages_by_tokens(
    gone: int,
    tmp_path: Path,
    novels_8m: Path,
    some_text: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Expert 3 is 1 with its neurons in another order, so merged into that one it changes nothing;
    expert 0, whose row of the router is close to 2's, moves that one, by its share of the tokens.
    """
    from compress_methods.checkpoint.safetensors import read_tensors, write_tensors

    model = mixture("mixtral", tmp_path / "m", novels_8m)
    tensors = read_tensors(model / "model.safetensors")
    order = torch.randperm(256, generator=torch.Generator().manual_seed(0))
    for layer in (0, 1):
        name = f"model.layers.{layer}.block_sparse_moe"
        for leaf in ("w1", "w2", "w3"):
            axis = 1 if leaf == "w2" else 0
            found = tensors[f"{name}.experts.1.{leaf}.weight"].index_select(axis, order)
            tensors[f"{name}.experts.3.{leaf}.weight"] = found.contiguous()
        gate = tensors[f"{name}.gate.weight"]
        gate[3], gate[0] = gate[1] * 1.01, gate[2] * 1.01
    write_tensors(model / "model.safetensors", tensors)
    salient, tokens = torch.full((4,), 2.0), torch.tensor([10.0, 20.0, 30.0, 40.0])
    salient[gone] = 1.0
    monkeypatch.setattr(passes, "_saliency", lambda part, owner: (salient, tokens))
    asked = recipe(1)
    asked["stages"][0]["merge"] = True
    report = convert(model, asked, tmp_path / "out", calibration=some_text, quiet=True)
    assert set(report["notes"].values()) == {f"experts {gone} merged"}
    found = {name: entry.read() for name, entry in read_entries(tmp_path / "out").items()}
    kept = [i for i in range(4) if i != gone]
    for layer in (0, 1):
        name = f"model.layers.{layer}.block_sparse_moe.experts"
        for number, old in enumerate(kept):
            for leaf in ("w1", "w2", "w3"):
                before = tensors[f"{name}.{old}.{leaf}.weight"]
                after = found[f"{name}.{number}.{leaf}.weight"]
                if (gone, old) != (0, 2):
                    torch.testing.assert_close(after, before)
                    continue
                other = tensors[f"{name}.0.{leaf}.weight"]
                # Whatever its neurons' order, a quarter of expert 0 is in it now.
                moved = (after - 0.75 * before).flatten().sort().values
                torch.testing.assert_close(moved, (0.25 * other).flatten().sort().values)


def test_experts_with_biases_are_not_merged(tmp_path: Path, novels_8m: Path) -> None:
    model = mixture("gpt_oss", tmp_path / "m", novels_8m)
    asked = recipe(1)
    asked["stages"][0]["merge"] = True
    with pytest.raises(RecipeError, match=r"merge: the experts of .* have biases; leave it out"):
        open_stages(model, load_staged(asked), False, 1, quiet=True)


def test_groups_keep_as_many_each() -> None:
    salient = torch.tensor([5.0, 1.0, 4.0, 9.0, 8.0, 7.0])
    assert _kept(salient, 4, 1).tolist() == [0, 3, 4, 5]
    assert _kept(salient, 4, 2).tolist() == [0, 2, 3, 4]


def test_pruned_experts_may_be_packed(tmp_path: Path, novels_8m: Path, some_text: Path) -> None:
    model = mixture("mixtral", tmp_path / "m", novels_8m)
    packing = {
        "formats": {"w": {"format": "integer", "bits": 4, "group_size": 32}},
        "modules": [{"match": "experts", "format": "w", "algorithm": "gptq"}],
    }
    convert(model, recipe(1, packing), tmp_path / "out", calibration=some_text, quiet=True)
    assert len(open_compressed(tmp_path / "out").matrices) == 2 * 3 * 3


def test_the_shipped_recipe_drops_a_quarter(tmp_path: Path, novels_8m: Path) -> None:
    model = mixture("mixtral", tmp_path / "m", novels_8m)
    (stage,) = open_stages(model, load_staged("experts25"))
    assert stage.facts()["changes"] == {"num_local_experts": [4, 3]}


def test_what_cannot_be_pruned_so_is_one_line(tmp_path: Path, novels_8m: Path) -> None:
    model = mixture("mixtral", tmp_path / "m", novels_8m)
    groups = {"n_routed_experts": 8, "n_group": 4, "topk_group": 4}
    grouped = mixture("deepseek_v3", tmp_path / "grouped", novels_8m, **groups)
    dense = make_model("Llama", tmp_path / "dense")
    for where, drop, line in (
        (model, 3, "experts: 1 of 4 experts would stay, but 2 are chosen for every token"),
        (model, 4, "experts: drop is 4 experts, the model has 4"),
        (model, 0.1, r"experts: drop is 10.0% of 4 experts, less than one"),
        (grouped, 4, "experts: 1 would stay in each of 4 groups, which are judged by their best 2"),
        (dense, 1, "experts: 'llama' has no experts that can be told"),
    ):
        with pytest.raises(RecipeError, match=line):
            open_stages(where, load_staged(recipe(drop)))
    with pytest.raises(RecipeError, match=r"drop is 1.5, .* or a whole number of experts"):
        load_staged(recipe(1.5))
