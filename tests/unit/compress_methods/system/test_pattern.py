"""Regular expressions of users: Python's answers, in a time that does not depend on them."""

from __future__ import annotations

import itertools
import random
import re
import time

import pytest

from compress_methods.checkpoint.quantization_config import parse
from compress_methods.errors import CheckpointError, RecipeError
from compress_methods.recipe.schema import parse_recipe
from compress_methods.system.pattern import PatternError, _Machine, matches_whole, parser

HANGS = [
    "(a+)+b",
    "(a*)*b",
    "(a|aa)+b",
    "(a?){40}a{40}b",
    "(.*)*x",
    ".*.*.*.*.*.*.*.*x",
    "(a+a+)+b",
]
NAME = "model.layers.11.mlp.experts.7.up_proj"
PATTERNS = [
    r"model\.layers\.\d+\.mlp\..*", r".*(up|down)_proj", r"(?!.*router).*", r"(?i)MODEL.*",
    r"model\.layers\.(1[0-9]|[2-9])\..*", r"[^.]+(\.[^.]+)*", r"(\w+\.)+\w+", r"^.*$",
    r".*\bup_proj",
    r"model(?=\.layers).*", r"(a|b)*", r"((model|layers|mlp|\d+)\.)*[a-z_.0-9]*", r"x{2,3}|.{37}",
]  # fmt: skip


@pytest.mark.parametrize("pattern", HANGS)
def test_no_pattern_hangs(pattern: str) -> None:
    began = time.monotonic()
    assert not matches_whole(pattern, "a" * 60 + "!")
    rules = {"formats": {"w": {"format": "integer", "bits": 4, "group_size": 32}}}
    modules = [{"match": f"re:{pattern}", "format": "w"}]
    rule = parse_recipe({**rules, "modules": modules}, "x", "x").modules[0]
    spec = parse({"quant_method": "vllm_compress", "version": 1, **rules, "modules": modules})
    assert not rule.matches("a" * 60 + "!", "blocks")
    assert spec.format_for("a" * 60 + "!") is None
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("pattern", PATTERNS)
def test_states_give_the_answers_of_re(pattern: str) -> None:
    tree = parser.parse(pattern)
    machine = _Machine(tree, tree.state.flags)
    texts = ["", "ab", "xx", NAME, NAME.upper(), "lm_head", NAME.replace("up", "router.up"), "a.b"]
    for text in texts:
        expected = re.fullmatch(pattern, text) is not None
        assert machine.matches(text) is expected, text
        assert matches_whole(pattern, text) is expected, text


def test_random_patterns_over_all_short_texts() -> None:
    chance = random.Random(0)
    pieces = ["a", "b", ".", "[ab]", "[^a]", "(a|b)", "(ab|a)", "(?:a*b)", "^", "$", r"\b", "(?=a)"]
    texts = ["".join(t) for n in range(5) for t in itertools.product("ab.", repeat=n)]
    for _ in range(300):
        chosen = [chance.choice(pieces) for _ in range(chance.randint(1, 4))]
        more = ["", "", "*", "+?", "?", "{1,2}"]
        pattern = "".join(p + (chance.choice(more) if p[0] in "ab.[(" else "") for p in chosen)
        tree = parser.parse(pattern)
        machine, compiled = _Machine(tree, tree.state.flags), re.compile(pattern)
        for text in texts:
            expected = compiled.fullmatch(text) is not None
            assert machine.matches(text) is expected, (pattern, text)


@pytest.mark.parametrize(
    "pattern",
    [
        "(",
        "a" * 1001,
        "(" * 500 + ")" * 500,
        "(a|bc)*(a|cd)\\1",
        "(a{0,999}){0,999}",
        "(a++)*b*c*d*",
    ],
)
def test_what_cannot_be_followed_is_refused(pattern: str) -> None:
    with pytest.raises(PatternError):
        matches_whole(pattern, "aa")
    formats = {"w": {"format": "integer", "bits": 4, "group_size": 32}}
    modules = [{"match": f"re:{pattern}", "format": "w"}]
    with pytest.raises(RecipeError, match=r"x: modules\[0\]: match"):
        parse_recipe({"formats": formats, "modules": modules}, "x", "x")
    block = {"quant_method": "vllm_compress", "version": 1, "formats": formats, "modules": modules}
    with pytest.raises(CheckpointError, match=r"modules\[0\]: match"):
        parse(block)
