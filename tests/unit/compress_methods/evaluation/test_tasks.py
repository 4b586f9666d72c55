"""Multiple-choice questions: right answers, the same log-likelihoods block by block as whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from compress_methods import convert
from compress_methods.calibration.tokenizer import load_tokenizer
from compress_methods.checkpoint.loading.model import load_model
from compress_methods.errors import CalibrationError
from compress_methods.evaluation import streamed
from compress_methods.evaluation.harness import HARNESS, HarnessError, run_task
from compress_methods.evaluation.streamed import StreamedModel
from compress_methods.evaluation.tasks import compare, read_questions, require_task, score
from tests.robustness.result import tiny_model
from vllm_compress.cli import main

CPU = torch.device("cpu")
ENDS = ["nothing more.", "the the of", "xq zj vv"]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def rows(count: int = 12) -> list[dict[str, Any]]:
    prompts = ["She was not there, and he said", "It was a truth universally", "He went"]
    return [
        {
            "prompt": f"{n}. {prompts[n % 3]} " * (n % 4) + prompts[n % 3],
            "choices": ENDS,
            "answer": n // 3 % 3,
        }
        for n in range(count)
    ]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def compressed(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything compressed, activations too."""
    out = tmp_path_factory.mktemp("tasks") / "out"
    dynamic = {"format": "integer", "bits": 8, "group_size": -1, "activations": "int8"}
    table = {"format": "integer", "bits": 4, "group_size": 32}
    modules = [
        {"match": "blocks", "format": "d"},
        {"match": ["embedding", "lm_head"], "format": "w"},
    ]
    recipe = {"formats": {"d": dynamic, "w": table}, "modules": modules}
    convert(tiny, recipe | {"calibration": {"held_out": 0}}, out, quiet=True)
    return out


@pytest.mark.parametrize("which", ["original", "compressed"])
def test_logits_block_by_block_are_those_of_the_whole_model(
    which: str, tiny: Path, compressed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of many lengths, in several portions."""
    directory = tiny if which == "original" else compressed
    generator = torch.Generator().manual_seed(0)
    lengths = [1, 3, 16, 17, 40, 33, 5, 5, 5, 5, 5, 5, 5, 5, 5]
    tokens = [torch.randint(4096, (n,), generator=generator).tolist() for n in lengths]
    width = json.loads((tiny / "config.json").read_text())["hidden_size"]
    monkeypatch.setattr(streamed, "PORTION_BYTES", 4 * width * 200)
    found = dict(StreamedModel(directory, CPU).logits(tokens))
    model = load_model(directory)
    assert len(found) == len(tokens)
    for i, row in enumerate(tokens):
        with torch.inference_mode():
            expected = model(input_ids=torch.tensor([row])).logits[0]
        torch.testing.assert_close(found[i], expected, rtol=1e-3, atol=1e-3)


def test_the_likeliest_choice_is_the_answer(tiny: Path, tmp_path: Path) -> None:
    """Against log-likelihoods computed one choice at a time by transformers."""
    path = write(tmp_path / "q.jsonl", rows())
    model, tokenizer = load_model(tiny), load_tokenizer(tiny)
    expected = {}
    for number, row in enumerate(rows(), 1):
        likely = []
        for choice in row["choices"]:
            prompt = tokenizer(row["prompt"])["input_ids"]
            whole = tokenizer(f"{row['prompt']} {choice}")["input_ids"]
            with torch.inference_mode():
                log_p = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
            after = range(len(prompt), len(whole))
            likely.append(sum(log_p[i - 1, whole[i]].item() for i in after))
        expected[str(number)] = float(max(range(3), key=likely.__getitem__) == row["answer"])
    assert 0 < sum(expected.values()) < len(expected)
    assert score(path, tiny, tiny, CPU)["acc"] == expected


def test_answers_may_be_texts_and_long_prompts_lose_their_beginning(
    tiny: Path, tmp_path: Path
) -> None:
    row = {"prompt": "word " * 3000 + "She was not", "choices": ["there", "xq"], "answer": "there"}
    path = write(tmp_path / "q.jsonl", [row])
    assert read_questions(path)["1"].answer == 0
    assert score(path, tiny, tiny, CPU) == {"acc": {"1": 1}}


def test_changes_are_paired_by_question(tmp_path: Path) -> None:
    base = {"acc_norm": {"1": 1.0, "2": 0.0, "3": 1.0}, "acc": {"1": 1.0, "2": 1.0, "3": 0.0}}
    other = {"acc_norm": {"1": 1.0, "2": 0.0, "3": 1.0}, "acc": {"1": 1.0, "2": 0.0, "3": 0.0}}
    first, second = compare(tmp_path / "q.yaml", base, other)
    assert (first.metric, first.base, first.score) == ("acc", 2 / 3, 1 / 3)
    assert first.change.value == pytest.approx(-1 / 3)
    assert first.change.low < -1 / 3 < first.change.high
    assert (second.metric, second.change.value) == ("acc_norm", 0)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ([], "expected an object with prompt, choices, answer"),
        ({"prompt": "a", "choices": ["b", "c"]}, "expected an object with"),
        ({"prompt": " ", "choices": ["b", "c"], "answer": 0}, "prompt is ' '"),
        ({"prompt": "a", "choices": ["b"], "answer": 0}, "expected two texts or more"),
        ({"prompt": "a", "choices": ["b", 3], "answer": 0}, "expected two texts or more"),
        ({"prompt": "a", "choices": ["b", "c"], "answer": 2}, "expected an index from 0 to 1"),
        ({"prompt": "a", "choices": ["b", "c"], "answer": True}, "answer is True"),
        ({"prompt": "a", "choices": ["b", "b"], "answer": "b"}, "the text of one choice"),
    ],
)
def test_a_line_that_is_no_question_is_named(row: Any, words: str, tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", [rows()[0], row])
    with pytest.raises(CalibrationError) as caught:
        require_task(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert words in str(caught.value)


def test_files_that_are_no_tasks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"ends in '\.txt', expected \.jsonl"):
        require_task(tmp_path / "q.txt")
    with pytest.raises(CalibrationError, match="no such file"):
        require_task(tmp_path / "q.jsonl")
    (tmp_path / "q.jsonl").write_text("\n")
    with pytest.raises(CalibrationError, match="holds no questions"):
        require_task(tmp_path / "q.jsonl")


def test_eval_asks_both_models(
    tiny: Path, compressed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "q.jsonl", rows(6))
    command = ["eval", str(compressed), "--against", str(tiny), "--tasks", str(path)]
    assert main([*command, "--json", "--quiet"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["tasks"]
    assert (found["task"], found["metric"], found["questions"]) == ("q.jsonl", "acc", 6)
    assert found["interval"][0] < found["change"] < found["interval"][1]
    assert main([*command, "--quiet"]) == 0
    line = capsys.readouterr().out
    assert line.startswith(
        f"q.jsonl acc: {found['score']:.1%} (original {found['base_score']:.1%})"
    )
    assert main(["eval", str(compressed), "--against", str(tiny)]) == 2
    assert "expected --text FILE, --tasks FILE, --pairs FILE or several" in capsys.readouterr().err
    assert main([*command, "--url", "http://127.0.0.1:9"]) == 2
    assert "--tasks loads DIR" in capsys.readouterr().err


def task_file(folder: Path) -> Path:
    """The questions as a task of lm-evaluation-harness."""
    path = folder / "ends.yaml"
    data = write(folder / "ends.json", rows())
    block = {
        "task": "ends",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    path.write_text(json.dumps(block))
    return path


@pytest.mark.slow
def test_the_harness_gives_the_same_answers(tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip(HARNESS)
    path = task_file(tmp_path)
    found = score(path, tiny, tiny, CPU)
    assert set(found) == {"acc", "acc_norm"}
    ours = score(write(tmp_path / "q.jsonl", rows()), tiny, tiny, CPU)
    assert list(found["acc"].values()) == list(ours["acc"].values())
    block = json.loads(path.read_text())
    del block["doc_to_choice"]
    block |= {"output_type": "generate_until", "metric_list": [{"metric": "exact_match"}]}
    path.write_text(json.dumps(block | {"generation_kwargs": {"until": ["."]}}))
    with pytest.raises(
        HarnessError, match=r"ends\.yaml on .*: output_type: expected multiple_choice"
    ):
        score(path, tiny, tiny, CPU)


def test_without_the_harness_its_tasks_are_one_line(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compress_methods.evaluation import harness

    monkeypatch.setattr(harness, "find_spec", lambda _: None)
    with pytest.raises(HarnessError, match=r"ends\.yaml needs lm-evaluation-harness; pip install"):
        run_task(task_file(tmp_path), StreamedModel(tiny, CPU), tiny, None)
