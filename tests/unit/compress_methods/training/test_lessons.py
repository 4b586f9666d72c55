"""Questions with answers as rows: what counts, what is refused, and what training on them wins."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from compress_methods import recover
from compress_methods.calibration.text import encode
from compress_methods.checkpoint.loading.model import load_model
from compress_methods.errors import CalibrationError, RecipeError
from compress_methods.recipe.training import Training
from compress_methods.training.lessons import COUNTED, TOKENS, TOP_LOGPROBS, TOP_TOKENS
from compress_methods.training.material import collate, read_material
from compress_methods.training.objectives.losses import token_loss, top_divergence
from compress_methods.training.student import Student

SMALL: dict[str, Any] = {"batch": 2, "sequences": 4, "held_out": 1, "length": 48}
COLOURS = ("red", "green", "blue", "white", "black", "brown", "yellow", "grey")


def chat(question: str, answer: str) -> dict[str, Any]:
    said = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": said, "style": "icl", "seed": [1], "answer": answer}


def file_of(folder: Path, *rows: Any) -> Path:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def sft(path: Path, loss: str = "", **more: Any) -> Training:
    return Training("sft", loss, data=str(path), **{**SMALL, **more})


def answers_of(rows: Any, tokenizer: Any) -> set[str]:
    return {tokenizer.decode(row[TOKENS][row[COUNTED]]) for row in rows}


@pytest.mark.parametrize(
    ("kind", "ends"),
    [("messages", "\n<|endoftext|>"), ("prompt", "<|endoftext|>"), ("alpaca", "<|endoftext|>")],
)
def test_only_answers_count(
    kind: str, ends: str, novels_8m: Path, tokenizer: Any, tmp_path: Path
) -> None:
    makers: dict[str, Any] = {
        "messages": lambda c: chat("What colour is it?", c),
        "prompt": lambda c: {"prompt": "The colour is", "completion": f" {c}"},
        "alpaca": lambda c: {"instruction": "Say the colour.", "input": "", "output": c},
    }
    path = file_of(tmp_path, *map(makers[kind], COLOURS[:6]))
    rows = read_material(novels_8m, sft(path)).rows
    assert rows is not None
    lead = " " if kind == "prompt" else ""
    assert answers_of(rows, tokenizer) == {f"{lead}{c}{ends}" for c in COLOURS[:6]}
    (question,) = {tokenizer.decode(row[TOKENS][~row[COUNTED]]) for row in rows}
    assert question in ("What colour is it?\n", "The colour is", "Say the colour.\n\n")


def test_the_order_is_drawn_from_the_seed(novels_8m: Path, tokenizer: Any, tmp_path: Path) -> None:
    path = file_of(tmp_path, *(chat("Which?", c) for c in COLOURS))
    found = [read_material(novels_8m, sft(path, seed=seed)).rows for seed in (1, 1, 2)]
    first, again, other = ([row[TOKENS].tolist() for row in rows or ()] for rows in found)
    assert first == again != other


def test_text_counts_whole(novels_8m: Path, some_text: Path) -> None:
    rows = read_material(novels_8m, sft(some_text)).rows
    assert rows is not None
    assert [row.keys() for row in rows] == [{TOKENS}] * 6


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": [{"role": "user", "content": "a"}]}, "messages end without an answer"),
        (chat("a", " "), "content of the last message is empty"),
        ({"prompt": "a", "completion": ""}, "completion is empty"),
        ({"prompt": "a"}, "has neither text nor messages"),
        ({"text": "a"}, "has text, expected an answer"),
        ({"prompt": "", "completion": "b"}, "has an answer to nothing"),
        (chat("a " * 60, "b"), "length is 48; give at least"),
        ([], "expected an object, found list"),
    ],
)
def test_bad_lines_are_named(row: Any, said: str, novels_8m: Path, tmp_path: Path) -> None:
    path = file_of(tmp_path, chat("a", "b"), row)
    with pytest.raises(CalibrationError, match=r"data\.jsonl:2: ") as problem:
        read_material(novels_8m, sft(path))
    assert said in str(problem.value)


def test_too_few_answers_say_what_fits(novels_8m: Path, tmp_path: Path) -> None:
    path = file_of(tmp_path, *(chat("Which?", c) for c in COLOURS[:5]))
    with pytest.raises(CalibrationError, match=r"5 answers, expected 6 .*sequences: 3 fits"):
        read_material(novels_8m, sft(path))


def with_logprobs(tokenizer: Any, **changes: Any) -> dict[str, Any]:
    said = encode(tokenizer, "blue")
    block = {
        "ids": True,
        "tokens": said,
        "logprobs": [-0.1] * len(said),
        "top_tokens": [[token, 7] for token in said],
        "top_logprobs": [[-0.1, -3.0] for _ in said],
    }
    return {**chat("Which?", "blue"), "logprobs": {**block, **changes}}


def test_likeliest_tokens_stand_where_they_are_predicted(
    novels_8m: Path, tokenizer: Any, tmp_path: Path
) -> None:
    path = file_of(tmp_path, *[with_logprobs(tokenizer)] * 6)
    rows = read_material(novels_8m, sft(path, "topk_kl")).rows
    assert rows is not None
    row, said = rows[0], encode(tokenizer, "blue")
    assert answers_of(rows, tokenizer) == {"blue"}
    places = row[TOP_LOGPROBS].isfinite().all(-1)
    assert torch.equal(places[:-1], row[COUNTED][1:])
    assert row[TOP_TOKENS][places].tolist() == [[token, 7] for token in said]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ids": False}, "logprobs has texts, expected ids of tokens"),
        ({"tokens": [5]}, "lists of different lengths|do not spell the answer"),
        ({"top_tokens": None}, "logprobs lacks top_tokens"),
        ({"top_tokens": [[9_999_999, 7]] * 8}, "lists of different lengths|does not have"),
    ],
)
def test_bad_logprobs_are_named(
    changes: dict[str, Any], said: str, novels_8m: Path, tokenizer: Any, tmp_path: Path
) -> None:
    path = file_of(tmp_path, with_logprobs(tokenizer), with_logprobs(tokenizer, **changes))
    with pytest.raises(CalibrationError, match=rf"data\.jsonl:2: .*({said})"):
        read_material(novels_8m, sft(path, "topk_kl"))


def test_all_tokens_named_it_is_kl() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher, student = torch.randn(2, 1, 4, 6, generator=generator)
    log_p, names = teacher.log_softmax(-1).sort(-1, descending=True)
    exact = (log_p.exp() * (log_p - student.log_softmax(-1).gather(-1, names))).sum(-1).mean()
    torch.testing.assert_close(top_divergence(names, log_p, student), exact, rtol=1e-3, atol=1e-5)
    few = top_divergence(names[..., :3], log_p[..., :3], student)
    assert 0 < few < exact
    assert top_divergence(names[..., :3], log_p[..., :3], teacher).abs() < 1e-6


def test_rows_of_a_batch_do_not_change_each_other(novels_8m: Path) -> None:
    student = Student(novels_8m, "sft", torch.device("cpu"))
    rows = [{TOKENS: torch.arange(n) + 100, COUNTED: torch.arange(n) >= n - 3} for n in (9, 20)]
    losses = []
    for some in (rows[:1], rows[1:], rows):
        batch = collate(some)
        with torch.no_grad():
            losses.append(token_loss(batch[TOKENS], student(batch[TOKENS]), batch[COUNTED]))
    torch.testing.assert_close((losses[0] + losses[1]) / 2, losses[2])


def test_a_model_learns_the_answers(novels_8m: Path, tokenizer: Any, tmp_path: Path) -> None:
    path = file_of(tmp_path, *(chat(f"Tom has {i} apples.", "blue") for i in range(40)))
    settings = sft(path, steps=12, sequences=30, held_out=4, batch=6, rate=0.01)
    report = recover(novels_8m, novels_8m, tmp_path / "out", settings, quiet=True)
    facts = report["training"][0]
    assert facts["held_out"]["perplexity"] < 0.3 * facts["before"]["perplexity"]
    assert facts["held_out"]["tokens"] == 4 * (len(encode(tokenizer, "blue\n")) + 1)
    ids = torch.tensor([encode(tokenizer, "Tom has 99 apples.\n")])
    said = load_model(tmp_path / "out").generate(ids, do_sample=False, max_new_tokens=4)
    assert tokenizer.decode(said[0, ids.shape[1] :]).startswith("blue")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"loss": "kl"}, "loss is 'kl', expected ce or topk_kl of sft"),
        ({"on_policy": 0.5}, "on_policy needs a loss of kl, reverse_kl"),
    ],
)
def test_what_sft_cannot_be_is_refused(more: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        Training("sft", **more)


def test_ce_is_what_perplexity_is_made_of(novels_8m: Path) -> None:
    tokens = torch.randint(100, 4000, (1, 30), generator=torch.Generator().manual_seed(0))
    logits = load_model(novels_8m)(input_ids=tokens).logits
    wanted = math.exp(torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:]).item())
    assert math.exp(token_loss(tokens, logits, None).item()) == pytest.approx(wanted, rel=1e-5)
