"""Calibration sequences are reproducible, whole, and never shared with the held-out ones."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from compress_methods.calibration import tokens as calibration
from compress_methods.calibration.settings import CalibrationSettings
from compress_methods.calibration.text import leading_bos, windows
from compress_methods.calibration.tokenizer import load_tokenizer
from compress_methods.calibration.tokens import load_tokens, text_name
from compress_methods.errors import CalibrationError, CheckpointError

ASSET = Path(__file__).parents[3] / "assets" / "novels-8m"
SMALL = CalibrationSettings(samples=4, length=16, seed=0, held_out=2)
WORDS = [f"chapter {i} tells of number {i * 7919 % 1000} and little else" for i in range(60)]


def jsonl(folder: Path, rows: list[Any]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def text_file(folder: Path, text: str) -> Path:
    path = folder / "text.txt"
    path.write_text(text)
    return path


def parquet(folder: Path, columns: dict[str, Any]) -> Path:
    import pyarrow
    import pyarrow.parquet

    path = folder / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=7)
    return path


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_the_seed_and_nothing_else_decides(kind: str, tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"text": text} for text in WORDS]
    source = text_file(tmp_path, " ".join(WORDS)) if kind == "txt" else jsonl(tmp_path, rows)
    first = load_tokens(source, tokenizer, SMALL)
    torch.manual_seed(123)
    assert torch.equal(first, load_tokens(source, tokenizer, SMALL))
    other = CalibrationSettings(samples=4, length=16, seed=1, held_out=2)
    assert not torch.equal(first, load_tokens(source, tokenizer, other))
    assert first.shape == (6, 16)
    assert first.dtype == torch.int64


@pytest.mark.parametrize("seed", range(5))
def test_no_token_of_the_text_is_in_two_rows(seed: int, tmp_path: Path, tokenizer: Any) -> None:
    """Every token is unlike all others here, so a repeated one would be an overlap."""
    vocabulary = [t for t in tokenizer.get_vocab() if t.isascii() and t.isalpha() and len(t) > 2]
    ids = [i for t in vocabulary if len(i := tokenizer(f"\n{t}")["input_ids"]) == 2]
    unique = list(dict.fromkeys(i[1] for i in ids))
    path = text_file(tmp_path, "".join("\n" + tokenizer.decode([i]) for i in unique))
    rows = len(unique) * 2 // 16
    settings = CalibrationSettings(samples=rows - 4, length=16, seed=seed, held_out=3)
    tokens = load_tokens(path, tokenizer, settings)
    words = tokens[tokens != tokenizer("\n")["input_ids"][0]]
    assert len(words) >= tokens.numel() // 2 - 1
    assert len(words.unique()) == len(words)


def test_held_out_rows_are_documents_of_their_own(tmp_path: Path, tokenizer: Any) -> None:
    """Even where the file repeats documents."""
    source = jsonl(tmp_path, [{"text": text} for text in WORDS * 3])
    tokens = load_tokens(source, tokenizer, CalibrationSettings(20, 16, 0, 10))
    seen, held = (tokenizer.decode(t.flatten().tolist()) for t in (tokens[:20], tokens[20:]))
    whole = [text for text in WORDS if text in seen]
    assert len(whole) > 5
    assert not [text for text in whole if text in held]


def test_documents_are_joined_by_eos_and_packed_without_gaps(
    tmp_path: Path, tokenizer: Any
) -> None:
    source = jsonl(tmp_path, [{"text": text} for text in WORDS])
    stream = load_tokens(source, tokenizer, SMALL).flatten().tolist()
    documents = tokenizer.decode(stream).split(tokenizer.eos_token)
    assert len(documents) > 3
    assert set(documents[:-1]) <= set(WORDS)
    assert any(text.startswith(documents[-1]) for text in WORDS)


def test_every_row_starts_as_a_prompt_would(tmp_path: Path, tokenizer: Any, with_bos: Any) -> None:
    assert leading_bos(tokenizer) is None
    assert leading_bos(with_bos) == 0
    source = text_file(tmp_path, " ".join(WORDS))
    tokens = load_tokens(source, with_bos, SMALL)
    assert tokens.shape == (6, 16)
    assert (tokens[:, 0] == 0).all()
    assert (tokens[:, 1:] != 0).all()
    found = windows(source, with_bos, 16, limit=40)
    assert [len(window) for window in found] == [16, 16, 11]
    assert (
        torch.cat([w[1:] for w in found]).tolist() == tokenizer(" ".join(WORDS))["input_ids"][:40]
    )


def test_windows_of_a_long_text_come_from_all_of_it(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it is not tokenized whole."""
    text = " ".join(WORDS * 20)
    source = text_file(tmp_path, text)
    counted = []
    encode = calibration.encode
    monkeypatch.setattr(
        calibration, "encode", lambda t, some: counted.append(len(some)) or encode(t, some)
    )
    tokens = load_tokens(source, tokenizer, SMALL)
    assert tokens.shape == (6, 16)
    assert sum(counted) < len(text) / 4
    assert all(tokenizer.decode(row.tolist()).strip() in text for row in tokens)


def test_chats_go_through_the_template(tmp_path: Path, tokenizer: Any) -> None:
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"{text}?"},
                {"role": "assistant", "content": "Yes."},
            ]
        }
        for text in WORDS
    ]
    stream = load_tokens(jsonl(tmp_path, chats), tokenizer, SMALL).flatten().tolist()
    first = tokenizer.decode(stream).split(tokenizer.eos_token)[0]
    assert first in [tokenizer.apply_chat_template(c["messages"], tokenize=False) for c in chats]


def test_parquet_equals_jsonl(tmp_path: Path, tokenizer: Any) -> None:
    chats = [[{"role": "user", "content": text}] for text in WORDS]
    for column, values in (("text", WORDS), ("messages", chats)):
        lines = jsonl(tmp_path, [{column: value} for value in values])
        table = parquet(tmp_path, {"id": list(range(60)), column: values})
        expected = load_tokens(lines, tokenizer, SMALL)
        assert torch.equal(load_tokens(table, tokenizer, SMALL), expected)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"", "a.txt: holds no text"),
        ("a.txt", b" \n\n", "a.txt: holds no text"),
        ("a.txt", b"ab\xff", "a.txt: not UTF-8 (byte 2)"),
        ("a.csv", b"text", "ends in '.csv', expected .txt, .jsonl, .parquet"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": "b"', "a.jsonl:3: not JSON"),
        ("a.jsonl", b'{"text": "a"}\n"b"', "a.jsonl:2: expected an object, found str"),
        ("a.jsonl", b'{"text": "a"}\n{"body": "b"}', "a.jsonl:2: has neither text nor messages"),
        ("a.jsonl", b'{"text": 3}', "a.jsonl:1: text is int, expected a string"),
        ("a.jsonl", b'{"messages": ["hi"]}', "a.jsonl:1: messages is not a list of objects"),
        ("a.jsonl", b"{\xff}", "a.jsonl:1: not UTF-8"),
        ("a.parquet", b"PAR1", "a.parquet: not readable as parquet"),
    ],
)
def test_bad_input_is_one_line_that_says_where(
    name: str, content: bytes, says: str, tmp_path: Path, tokenizer: Any
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError) as caught:
        load_tokens(tmp_path / name, tokenizer, SMALL)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_wrong_columns_are_named(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(CalibrationError, match=r"none\.txt: no such file"):
        load_tokens(tmp_path / "none.txt", tokenizer, SMALL)
    source = parquet(tmp_path, {"prompt": ["a"], "answer": ["b"]})
    with pytest.raises(CalibrationError, match="columns are prompt, answer, expected text"):
        load_tokens(source, tokenizer, SMALL)


def test_parquet_without_pyarrow_names_the_extra(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = parquet(tmp_path, {"text": WORDS})
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(CalibrationError, match="pip install pyarrow"):
        load_tokens(source, tokenizer, SMALL)


def test_chats_need_a_template_that_takes_them(
    tmp_path: Path, novels_8m: Path, tokenizer: Any
) -> None:
    source = jsonl(tmp_path, [{"messages": [{"role": "user", "content": "hi"}]}])
    plain = load_tokenizer(novels_8m)
    plain.chat_template = None
    with pytest.raises(CalibrationError, match="tokenizer has no chat template"):
        load_tokens(source, plain, SMALL)
    plain.chat_template = "{{ raise_exception('no\nsystem role') }}"
    with pytest.raises(CalibrationError, match=r"refuses these messages \(no\)"):
        load_tokens(source, plain, SMALL)


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_too_short_a_text_says_what_fits_and_that_fits(
    kind: str, tmp_path: Path, tokenizer: Any
) -> None:
    rows = [{"text": text} for text in WORDS[:9]]
    source = text_file(tmp_path, " ".join(WORDS[:9])) if kind == "txt" else jsonl(tmp_path, rows)
    with pytest.raises(CalibrationError) as caught:
        load_tokens(source, tokenizer, CalibrationSettings(64, 16, 0, 2))
    message = str(caught.value)
    assert "tokens, expected 1056 (64 samples and 2 held-out sequences of 16)" in message
    fits = int(message.rpartition("samples: ")[2].removesuffix(" fits"))
    assert load_tokens(source, tokenizer, CalibrationSettings(fits, 16, 0, 2)).shape[0] == fits + 2
    with pytest.raises(CalibrationError):
        load_tokens(source, tokenizer, CalibrationSettings(fits + 1, 16, 0, 2))
    with pytest.raises(CalibrationError, match="give more text or a smaller length"):
        load_tokens(source, tokenizer, CalibrationSettings(1, 512, 0, 2))


@pytest.mark.parametrize(
    ("key", "value"), [("samples", 0), ("length", 7), ("held_out", -1), ("seed", True)]
)
def test_settings_are_checked(key: str, value: Any) -> None:
    with pytest.raises(CalibrationError, match=f"{key} is {value!r}, expected an integer from"):
        CalibrationSettings(**{key: value})


def test_reports_name_the_text_but_not_where_it_lay(tmp_path: Path) -> None:
    path = text_file(tmp_path, "hello")
    assert text_name(path) == "text.txt (sha256 2cf24dba5fb0)"
    assert text_name(None) == "sampled from the model itself"


def test_a_token_the_model_has_no_embedding_for_is_refused(tmp_path: Path, some_text: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(ASSET / name, tmp_path / name)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "vocab_size": 512}')
    tokenizer = load_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match=r"gives token \d+ \(.*its model knows 512 tokens"):
        windows(some_text, tokenizer, 64)
    (tmp_path / "config.json").write_text('{"text_config": {"vocab_size": 4096}}')
    assert windows(some_text, load_tokenizer(tmp_path), 64)
