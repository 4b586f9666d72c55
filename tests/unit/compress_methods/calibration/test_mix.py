"""Of several files each gives its share, told in the report, and none of another's text."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from compress_methods import convert
from compress_methods.calibration.mix import apportion, load_files
from compress_methods.calibration.settings import CalibrationSettings, TextFile
from compress_methods.calibration.tokens import load_tokens
from compress_methods.errors import CalibrationError

SMALL = CalibrationSettings(samples=9, length=16, held_out=4)
WORDS = ("north", "south")


def write(folder: Path, name: str, word: str, count: int = 80) -> Path:
    """Documents that all say `word`, so that a row shows where it is from."""
    path = folder / name
    lines = [json.dumps({"text": f"{word} {i} {word} {word} {i * 7} {word}"}) for i in range(count)]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def both(tmp_path: Path) -> tuple[Path, Path]:
    return write(tmp_path, "a.jsonl", "north"), write(tmp_path, "b.jsonl", "south")


def mix(files: tuple[Path, ...], *weights: float) -> CalibrationSettings:
    found = zip(files, weights or [1.0] * len(files), strict=True)
    return replace(SMALL, files=tuple(TextFile(path, weight) for path, weight in found))


def origins(tokens: torch.Tensor, tokenizer: Any) -> list[str]:
    texts = [tokenizer.decode(row.tolist()) for row in tokens]
    found = [[word for word in WORDS if word in text] for text in texts]
    assert all(len(words) == 1 for words in found)
    return [words[0] for words in found]


def test_sequences_are_drawn_by_weight(both: Any, tokenizer: Any) -> None:
    settings = mix(both, 2, 1)
    tokens, facts = load_files(tokenizer, settings)
    assert tokens.shape == (13, 16)
    found = origins(tokens, tokenizer)
    assert (found[:9].count("north"), found[9:].count("north")) == (6, 3)
    assert [(f.sequences, f.held_out_sequences, f.documents) for f in facts] == [
        (6, 3, 80),
        (3, 1, 80),
    ]
    assert facts[0].name.startswith("a.jsonl (sha256 ")
    assert found[:9] not in (sorted(found[:9]), sorted(found[:9], reverse=True))


def test_the_seed_and_the_files_decide(both: Any, tokenizer: Any) -> None:
    settings = mix(both)
    tokens, _ = load_files(tokenizer, settings)
    torch.manual_seed(5)
    assert torch.equal(tokens, load_files(tokenizer, settings)[0])
    assert not torch.equal(tokens, load_files(tokenizer, replace(settings, seed=1))[0])
    assert not torch.equal(tokens, load_files(tokenizer, mix(both, 2, 1))[0])


def test_one_file_is_what_it_always_was(both: Any, tokenizer: Any) -> None:
    tokens, facts = load_files(tokenizer, mix(both[:1]))
    assert torch.equal(tokens, load_tokens(both[0], tokenizer, SMALL))
    assert (facts[0].sequences, facts[0].held_out_sequences) == (9, 4)


@pytest.mark.parametrize(
    ("count", "weights", "shares"),
    [
        (64, [2, 1], [43, 21]),
        (64, [1, 1, 1], [22, 21, 21]),
        (8, [0.1, 0.1], [4, 4]),
        (0, [1, 2], [0, 0]),
        (3, [1e-9, 1.0], [0, 3]),
        (7, [3], [7]),
    ],
)
def test_shares_add_up(count: int, weights: list[float], shares: list[int]) -> None:
    assert apportion(count, weights) == shares


def test_a_document_of_two_files_is_taken_once(tmp_path: Path, tokenizer: Any) -> None:
    first = write(tmp_path, "a.jsonl", "north")
    second = tmp_path / "b.jsonl"
    south = write(tmp_path, "south.jsonl", "south").read_text()
    second.write_text(first.read_text() + "\n" + south)
    tokens, _ = load_files(tokenizer, mix((first, second)))
    assert origins(tokens, tokenizer).count("south") == 4 + 2
    with pytest.raises(CalibrationError, match=r"a\.jsonl: holds no text that another file"):
        load_files(tokenizer, mix((first, first)))


def test_a_file_without_its_share_is_one_line(tmp_path: Path, both: Any, tokenizer: Any) -> None:
    short = write(tmp_path, "short.jsonl", "south", 2)
    with pytest.raises(CalibrationError, match=r"short\.jsonl: \d+ tokens, expected 96 \(4 sampl"):
        load_files(tokenizer, mix((both[0], short)))
    with pytest.raises(CalibrationError, match="its share of the mix; give it more text or a sma"):
        load_files(tokenizer, mix((both[0], short)))
    with pytest.raises(CalibrationError, match=r"b\.jsonl: weight 1 of 101 is none of 9 samples"):
        load_files(tokenizer, mix(both, 100, 1))


def test_reports_tell_the_files_and_results_differ_by_weight(
    novels_8m: Path, both: Any, tmp_path: Path
) -> None:
    rule = {"match": "re:.*0.mlp.down_proj", "format": "w", "algorithm": "gptq"}
    block = {
        "formats": {"w": {"format": "integer", "bits": 4, "group_size": 128}},
        "modules": [rule],
        "calibration": {"samples": 3, "length": 16, "held_out": 2},
    }

    def run(name: str, **calibration: Any) -> dict[str, Any]:
        changed = {**block, "calibration": {**block["calibration"], **calibration}}
        return convert(novels_8m, changed, tmp_path / name, quiet=True)

    heavy = {"path": str(both[0]), "weight": 2}
    report = run("recipe", files=[heavy, str(both[1])])
    facts = report["calibration"]
    assert facts["sequences"] == 3
    assert facts["source"].count(" × ") == 2
    assert [file["sequences"] for file in facts["files"]] == [2, 1]
    assert str(tmp_path) not in json.dumps(report)
    card = (tmp_path / "recipe" / "README.md").read_text()
    assert "a.jsonl (sha256" in card
    assert "b.jsonl (sha256" in card
    equal = convert(novels_8m, block, tmp_path / "equal", calibration=list(both), quiet=True)
    assert [file["sequences"] for file in equal["calibration"]["files"]] == [2, 1]
    assert equal["fingerprint"] != report["fingerprint"]
    again = run("recipe", files=[heavy, str(both[1])])
    assert again["fingerprint"] == report["fingerprint"]
