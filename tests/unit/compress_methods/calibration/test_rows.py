"""Rows of data sets become the text that a person would read in them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from compress_methods import convert
from compress_methods.calibration.rows import read_row
from compress_methods.calibration.text import read_documents
from compress_methods.conversion.job import calibration_advice
from compress_methods.conversion.stages import open_stages
from compress_methods.errors import CalibrationError
from compress_methods.recipe.stages import load_staged


def render(messages: list[dict[str, Any]], **options: Any) -> str:
    """What templates do with content: they print it."""
    assert options == {"tools": None, "tokenize": False, "add_generation_prompt": False}
    return "".join(f"<{m['role']}>{m['content']}" for m in messages)


CHAT = SimpleNamespace(chat_template="x", apply_chat_template=render)
PARTS = [
    {"type": "text", "text": "What is "},
    {"type": "image_url", "image_url": {"url": "x"}},
    "on ",
    {"text": "this?"},
]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}
ROWS = [
    ({"text": "plain", "id": 3}, "plain"),
    ({"messages": [{"role": "user", "content": PARTS}]}, "<user>What is on this?"),
    ({"messages": [{"role": "user", "content": "hi"}, CALL]}, "<user>hi<assistant>"),
    ({"messages": [{"role": "user", "content": {"type": "text", "text": "a"}}]}, "<user>a"),
    (
        {
            "conversations": [
                {"from": "system", "value": "be brief"},
                {"from": "human", "value": "hi"},
                {"from": "gpt", "value": "ho"},
            ]
        },
        "<system>be brief<user>hi<assistant>ho",
    ),
    ({"instruction": "add", "input": "1 2", "output": "3"}, "add\n\n1 2\n\n3"),
    ({"instruction": "sing", "input": "", "output": "la"}, "sing\n\nla"),
    ({"instruction": "sing", "output": "la"}, "sing\n\nla"),
    ({"prompt": "once upon", "completion": " a time"}, "once upon a time"),
    ({"text": "whole", "prompt": "who", "completion": "le"}, "whole"),
    ({"text": None, "prompt": "who", "completion": "le"}, "whole"),
]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_every_form_is_read_as_text(kind: str, tmp_path: Path) -> None:
    if kind == "jsonl":
        path = tmp_path / "rows.jsonl"
        lines = [json.dumps(row) for row, _ in ROWS]
        path.write_bytes(b"\xef\xbb\xbf" + "\n".join(lines).encode())
        assert read_documents(path, CHAT) == [text for _, text in ROWS]
        return
    import pyarrow
    import pyarrow.parquet

    for row, text in (ROWS[4], ROWS[5], ROWS[8]):
        path = tmp_path / "rows.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)
        assert read_documents(path, CHAT) == [text]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert read_documents(tmp_path / "a.txt", CHAT) == ["hello"]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"body": "x"}, "here: has neither text nor messages"),
        ({"prompt": "x"}, "has neither"),
        ({"messages": [{"role": "user", "content": 3}]}, "content is int"),
        ({"messages": [{"role": "user", "content": [3]}]}, "a part of content is int"),
        ({"messages": [{"role": "user", "content": [{"text": 3}]}]}, "text of a part is int"),
        ({"conversations": [{"from": "nobody", "value": "x"}]}, "from is 'nobody', expected one"),
        ({"conversations": [{"from": {}, "value": "x"}]}, "from is {}, expected one"),
        ({"conversations": "x"}, "conversations is not a list"),
        ({"instruction": 3, "output": "x"}, "instruction is int, expected a string"),
    ],
)
def test_what_is_no_text_is_one_line(row: Any, words: str) -> None:
    with pytest.raises(CalibrationError, match=words):
        read_row(row, "here")


@pytest.mark.parametrize(
    ("samples", "algorithm", "said"), [(11, "gptq", True), (12, "gptq", False), (1, "rtn", False)]
)
def test_too_little_text_for_the_widest_matrix_is_said(
    samples: int, algorithm: str, said: bool, novels_8m: Path
) -> None:
    rule = {"match": "blocks", "format": "w", "algorithm": algorithm}
    block = {
        "formats": {"w": {"format": "integer", "bits": 4, "group_size": 128}},
        "modules": [rule],
        "calibration": {"samples": samples, "length": 512, "held_out": 1},
    }
    stages = open_stages(novels_8m, load_staged(block))
    advice = calibration_advice(stages)
    assert (advice is not None) is said
    if advice:
        assert "11 x 512 = 5,632 tokens" in advice
        assert "768 columns; at least 6,144" in advice
        assert "{samples: 12, length: 512}" in advice


def test_the_report_and_the_log_say_so(
    novels_8m: Path, some_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    block = {
        "formats": {"w": {"format": "integer", "bits": 4, "group_size": 128}},
        "modules": [{"match": "re:.*0.mlp.down_proj", "format": "w", "algorithm": "gptq"}],
        "calibration": {"samples": 2, "length": 64, "held_out": 1},
    }
    report = convert(novels_8m, block, tmp_path / "out", calibration=some_text)
    assert report["calibration"]["advice"] in capsys.readouterr().err.splitlines()
