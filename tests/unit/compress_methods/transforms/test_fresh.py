"""Students that know nothing: sizes as asked, values from the seed, and no way without training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from compress_methods import convert
from compress_methods.checkpoint.loading.model import load_model
from compress_methods.checkpoint.loading.tied import open_skeleton
from compress_methods.errors import RecipeError
from compress_methods.recipe.stages import load_staged
from compress_methods.transforms.fresh import Fresh

FRESH = {"transform": "fresh", "blocks": 4, "hidden": 128, "ffn": 256}
TRAIN = {"train": "distill", "batch": 2, "sequences": 8, "held_out": 2, "length": 32}
SMALL = {"samples": 2, "length": 32, "held_out": 2}


def chain(*stages: dict[str, Any]) -> dict[str, Any]:
    return {"stages": list(stages), "calibration": SMALL}


def test_a_fresh_student_learns_from_chance_on(
    novels_8m: Path, some_text: Path, tmp_path: Path
) -> None:
    train = {**TRAIN, "steps": 4, "data": str(some_text), "match": {"hidden": 0.5}}
    report = convert(
        novels_8m, chain(FRESH, train), tmp_path / "out", calibration=some_text, quiet=True
    )
    model = load_model(tmp_path / "out")
    config = model.config
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (4, 128, 256)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (2, 1, 64)
    fresh, trained = report["stages"]
    assert fresh["held_out"] is None
    assert fresh["bytes_after"] == 2 * sum(p.numel() for p in model.parameters())
    facts = report["training"][0]
    assert facts["before"]["perplexity"] == pytest.approx(math.exp(math.log(4096)), rel=0.1)
    assert facts["held_out"]["kl"] < facts["before"]["kl"]
    assert trained["bytes_after"] == fresh["bytes_after"]


def test_the_seed_says_the_values(novels_8m: Path) -> None:
    skeleton = open_skeleton(novels_8m)

    def values(seed: int) -> torch.Tensor:
        found = Fresh(blocks=2, seed=seed)._model(skeleton).model.layers[1].mlp.up_proj.weight
        assert found.std().item() == pytest.approx(skeleton.model.config.initializer_range, rel=0.1)
        return found

    first, again, other = (values(seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("stages", [(FRESH,), ({"transform": "depth"}, FRESH, TRAIN)])
def test_training_has_to_follow_at_once(stages: tuple[dict[str, Any], ...]) -> None:
    with pytest.raises(RecipeError, match="fresh comes first, and a train stage behind it"):
        load_staged(chain(*stages))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"blocks": 9}, "blocks is 9, expected at most the 8 of it"),
        ({"heads": 3}, "hidden 256, heads 3 and kv_heads 1 have to divide each other"),
        ({"hidden": 32}, "hidden 32, heads 0 and"),
        ({"ffn": -1}, "ffn is -1, expected a number from 0"),
        ({"hidden": 64 * 10**15}, "hidden is 64000000000000000, expected a number from 0 to 1,04"),
    ],
)
def test_bad_sizes_are_refused(
    more: dict[str, Any], said: str, novels_8m: Path, tmp_path: Path
) -> None:
    recipe = chain({"transform": "fresh", **more}, TRAIN)
    with pytest.raises(RecipeError) as problem:
        convert(novels_8m, recipe, tmp_path / "out", quiet=True)
    assert said in str(problem.value)
    assert not (tmp_path / "out").exists()
