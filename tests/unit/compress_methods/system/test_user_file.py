"""Limits of the one reader for YAML and JSON, each in one line that names the file and the key."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compress_methods.errors import CompressError, RecipeError
from compress_methods.system.user_file import read_json_value, read_yaml, require_path

LAUGHS = "\n".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9) if i else 'lol'}]" for i in range(12)
)
YAML = {
    "a: {b: 2020-01-01}": r"line 1: a.b is a date; write it in quotes",
    "a: [x, !!binary aGk=]": r"a\[1\] is binary data",
    "a: !!set {x}": "of the kind 'set'",
    "a: " + "9" * 5000: "a: a number of 5000 digits",
    "a: &a [*a]": "stands for itself",
    LAUGHS: "more than 100,000 values",
    "[" * 100 + "]" * 100: "nested deeper than 64",
    "a: {b: 1, b: 2}": "line 1: a.b is given twice",
    "? [1]\n: 2": "no plain text",
    "a: [": "not readable as YAML",
    "a: !!int ''": "not readable as YAML",
    "--- 1\n--- 2": "not readable as YAML",
}
JSON = {
    '{"a": ' + "9" * 5000 + "}": "a number of 5000 digits",
    '{"a": ["\\ud800"]}': "a.*half a character",
    "[" * 100 + "]" * 100: "nested deeper than 64",
    "[" * 100_000: "nested too deep",
    '{"a": ': "not readable as JSON",
}


@pytest.mark.parametrize(
    ("read", "text", "words"),
    [(read_yaml, *case) for case in YAML.items()]
    + [(read_json_value, *case) for case in JSON.items()],
    ids=[w[:20] for w in (*YAML.values(), *JSON.values())],
)
def test_every_limit_is_one_line(
    read: Callable[[Path, type[CompressError]], Any], text: str, words: str, tmp_path: Path
) -> None:
    (tmp_path / "mine").write_text(text)
    with pytest.raises(RecipeError, match=rf"mine: .*{words}") as caught:
        read(tmp_path / "mine", RecipeError)
    assert str(caught.value).isprintable()


def test_what_people_write_is_read(tmp_path: Path) -> None:
    path = tmp_path / "mine"
    path.write_bytes(
        b"\xef\xbb\xbfa: &x {b: [1_000, 2.5, yes, null, '2020-01-01']}\nc: {<<: *x, d: 1}"
    )
    inner = {"b": [1000, 2.5, True, None, "2020-01-01"]}
    assert read_yaml(path, RecipeError) == {"a": inner, "c": {**inner, "d": 1}}
    path.write_bytes(b"")
    assert read_yaml(path, RecipeError) is None
    path.write_bytes('\ufeff{"a": [1, 1e3, Infinity, "\u00e9"]}'.encode())
    assert read_json_value(path, RecipeError) == {"a": [1, 1000.0, float("inf"), "é"]}


@pytest.mark.parametrize("read", [read_yaml, read_json_value])
def test_files_that_are_none(read: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes("é".encode("latin-1"))
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(2**28 + 1)
    cases = [
        (tmp_path / "latin", "not UTF-8"),
        (tmp_path / "huge", "more than"),
        (tmp_path, "not a file"),
        (tmp_path / "gone", "no such file"),
        (tmp_path / ("x" * 300), "File name too long"),
        (Path("/dev/zero"), "not a file"),
        (Path("a\x00b"), "not UTF-8 or zero"),
        (Path("a\udcffb"), "not UTF-8 or zero"),
    ]
    for path, words in cases:
        with pytest.raises(RecipeError, match=words) as caught:
            read(path, RecipeError)
        assert str(caught.value).isprintable()


def test_a_path_that_is_not_there_yet_may_be_made(tmp_path: Path) -> None:
    require_path(tmp_path / "new" / "folder", RecipeError)
