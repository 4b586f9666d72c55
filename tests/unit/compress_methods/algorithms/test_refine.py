"""What a recipe can say of `refine`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compress_methods.algorithms import InputNorms
from compress_methods.algorithms.gptq import GPTQ
from compress_methods.algorithms.refine import Refine
from compress_methods.api import convert
from compress_methods.errors import RecipeError
from compress_methods.formats.integer import Integer
from compress_methods.recipe.schema import Recipe, load_recipe


def recipe(algorithm: Any, match: Any = "blocks", fmt: Any = None) -> dict[str, Any]:
    return {
        "formats": {"w": fmt or {"format": "integer", "bits": 4, "group_size": 128}},
        "modules": [{"match": match, "format": "w", "algorithm": algorithm}],
        "calibration": {"samples": 4, "length": 64, "held_out": 0},
    }


def algorithm_of(found: Recipe) -> Any:
    return found.modules[0].algorithm


def test_a_start_has_parameters_of_its_own_and_a_recipe_is_read_back_the_same() -> None:
    plain = load_recipe(recipe("refine"))
    clipped = load_recipe(
        recipe({"algorithm": "refine", "start": {"algorithm": "gptq", "clip": True}})
    )
    assert algorithm_of(plain).first == GPTQ()
    assert algorithm_of(clipped).first == GPTQ(clip=True)
    assert plain.sha256 != clipped.sha256 != load_recipe(recipe("gptq")).sha256
    assert algorithm_of(load_recipe(clipped.to_dict())) == algorithm_of(clipped)


def test_text_runs_whatever_the_start_needs() -> None:
    assert Refine().needs(Integer()) == GPTQ().needs(Integer())
    assert Refine(start="rtn").needs(Integer()) == (InputNorms,)
    assert load_recipe(recipe({"algorithm": "refine", "start": "rtn"})).needs_calibration


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"start": "gtpq"}, "unknown algorithm 'gtpq'; did you mean 'gptq'"),
        ({"start": {"algorithm": "gptq", "clop": True}}, "start: unknown key 'clop'"),
        ({"start": "refine"}, "refines already"),
        ({"iterations": 0}, "iterations is 0, expected at least 1"),
        ({"batch": 0}, "batch is 0, expected at least 1"),
        ({"rate": 0}, "rate is 0, expected more than 0"),
        ({"left_out": 1.0}, "left_out is 1.0, expected a share"),
        ({"precision": "int8"}, "precision is 'int8', expected float32 or bfloat16"),
    ],
)
def test_what_makes_no_sense_is_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        load_recipe(recipe({"algorithm": "refine", **wrong}))


def test_the_starts_own_demands_hold() -> None:
    with pytest.raises(RecipeError, match="'sparsegpt' cannot fill format 'integer'"):
        load_recipe(recipe({"algorithm": "refine", "start": "sparsegpt"}))


def test_what_lies_outside_the_blocks_cannot_be_refined(novels_8m: Path, tmp_path: Path) -> None:
    wrong = recipe({"algorithm": "refine", "start": "rtn"}, match=["blocks", "lm_head"])
    with pytest.raises(RecipeError, match=r"lm_head: .*trains the matrices of a decoder block"):
        convert(novels_8m, wrong, tmp_path / "out", quiet=True)
