"""Chats become what a server would make of them: one BOS, one EOS, tools, and no open answer."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from compress_methods import convert
from compress_methods.calibration.chat import render
from compress_methods.calibration.rows import Chat, read_row
from compress_methods.calibration.settings import CalibrationSettings
from compress_methods.calibration.text import read_documents, read_file, windows
from compress_methods.calibration.tokens import load_tokens
from compress_methods.errors import CalibrationError

EACH = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
GO = "{% if add_generation_prompt %}<assistant>{% endif %}"
ASKED = [{"role": "user", "content": "hi"}]


def templated(tokenizer: Any, template: str | None) -> Any:
    found = copy.deepcopy(tokenizer)
    found.chat_template = template
    return found


def chats(folder: Path, rows: list[Any]) -> Path:
    path = folder / "chats.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_an_answer_is_left_open_for_prompts_alone(tokenizer: Any) -> None:
    some = templated(tokenizer, EACH + GO)
    assert render(Chat(ASKED), "here", some) == "<user>hi"
    assert render(Chat(ASKED), "here", some, prompt=True) == "<user>hi<assistant>"


def test_a_bos_is_not_doubled(tokenizer: Any, with_bos: Any, tmp_path: Path) -> None:
    """Rows get it where the tokenizer puts it before texts; else the template's own stays."""
    template = "{{ bos_token }}" + EACH
    adds, bare = templated(with_bos, template), templated(tokenizer, template)
    assert render(Chat(ASKED), "here", adds) == "<user>hi"
    assert render(Chat(ASKED), "here", bare) == "<|endoftext|><user>hi"
    rows = [{"messages": [{"role": "user", "content": f"question {i}"}]} for i in range(9)]
    tokens = load_tokens(chats(tmp_path, rows), adds, CalibrationSettings(2, 16, 0, 1))
    assert (tokens[:, 0] == 0).all()
    assert (tokens[:, 1] != 0).all()
    window = windows(chats(tmp_path, rows), adds, 16)[0]
    assert window[:2].tolist()[1] != 0


def test_an_eos_is_not_doubled(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": f"question {i}"}]} for i in range(20)]
    some = templated(tokenizer, EACH + "{{ eos_token + '\n' }}")
    path = chats(tmp_path, rows)
    ids = load_tokens(path, some, CalibrationSettings(6, 16, 0, 1)).flatten().tolist()
    for joined in (some.decode(ids), some.decode(windows(path, some, 128)[0].tolist())):
        assert joined.count("<|endoftext|>\n<user>") >= 3
        assert "<|endoftext|><|endoftext|>" not in joined.replace("\n", "")


CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    ],
}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "of a city"}}]
USES = (
    "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}"
    "{% for m in messages %}{{ m.content }}"
    "{% if m.tool_calls is defined %}{% for c in m.tool_calls %}"
    "({{ c.function.arguments.city }}){% endfor %}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)])
def test_tools_and_their_calls_reach_the_template(tools: Any, tokenizer: Any) -> None:
    some = templated(tokenizer, USES)
    found = read_row({"messages": [*ASKED, CALL], "tools": tools}, "here")
    assert isinstance(found, Chat)
    assert render(found, "here", some) == "[weather]hi(Oslo)"


def test_tables_that_give_every_message_every_key(tokenizer: Any, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"messages": [{**ASKED[0], "tool_calls": None}, CALL], "tools": json.dumps(TOOLS)}]
    path = tmp_path / "chats.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert read_documents(path, templated(tokenizer, USES)) == ["[weather]hi(Oslo)"]


def test_tools_that_are_none_are_one_line() -> None:
    with pytest.raises(CalibrationError, match="here: tools is dict, expected a list"):
        read_row({"messages": ASKED, "tools": {"name": "weather"}}, "here")
    assert read_row({"messages": ASKED, "tools": None}, "here") == Chat(ASKED)


def test_chats_are_counted_and_joined_where_there_is_no_template(
    tokenizer: Any, tmp_path: Path
) -> None:
    answered = [*ASKED, {"role": "assistant", "content": "ho"}]
    path = chats(tmp_path, [{"text": "plain"}, {"messages": answered}, {"messages": []}])
    with_one, without = templated(tokenizer, EACH), templated(tokenizer, None)
    found = read_file(path, with_one, join_chats=True)
    assert (found.texts, found.rendered, found.joined) == (
        ["plain", "<user>hi<assistant>ho"],
        1,
        0,
    )
    found = read_file(path, without, join_chats=True)
    assert (found.texts, found.rendered, found.joined) == (["plain", "hi\n\nho"], 0, 1)
    with pytest.raises(CalibrationError, match="tokenizer has no chat template"):
        read_documents(path, without)


@pytest.mark.parametrize("template", [True, False])
def test_the_report_says_how_chats_were_read(
    template: bool, novels_8m: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for path in novels_8m.iterdir():
        if template or path.name != "chat_template.jinja":
            (model / path.name).symlink_to(path)
    rows = [
        {"messages": [{"role": "user", "content": f"why is {i} smaller than {i + 1}?"}]}
        for i in range(40)
    ]
    block = {
        "formats": {"w": {"format": "integer", "bits": 4, "group_size": 128}},
        "modules": [{"match": "re:.*0.mlp.down_proj", "format": "w", "algorithm": "gptq"}],
        "calibration": {"samples": 2, "length": 16, "held_out": 1},
    }
    calibration = chats(tmp_path, [*rows, {"text": "no chat"}])
    report = convert(model, block, tmp_path / "out", calibration=calibration)
    facts = report["calibration"]
    (file,) = facts["files"]
    assert file["documents"] == 41
    assert (file["rendered"], file["joined"]) == ((40, 0) if template else (0, 40))
    line = "calibration: 40 chats joined as plain text; the tokenizer has no chat template"
    assert facts.get("note") == (None if template else line)
    assert (line in capsys.readouterr().err.splitlines()) is not template
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("40 chats went through the chat template" in card) is template
