"""A task passed on by text alone: teacher taught, pruned, asked by `teach`, its student trained.

novels-8m learns the sums of `arithmetic.py` first. A quarter of its layers is then dropped, which
nearly ends that. The taught model, served by vLLM, writes its steps down under questions of which
some are left out (`teach --style cot`: several samples, the majority, checked against the known
answer), and two students learn from what it wrote by `train: sft`: one from the steps, the other
from the answers alone, which are those of the same questions. Figures are exact matches with the
true answer, in questions that neither teacher nor students have seen.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.loss.arithmetic import MARK, Question, questions, write_rows
from tests.benchmarks.loss.quality import MODEL
from tests.e2e.support.server import FEWER_PROCESSES, VllmServer

TESTED = {"one step": (1, 32), "two steps": (2, 200)}
"""Steps and number of questions of each test."""
HELD_OUT = 16
TEACHER: dict[str, Any] = {"steps": 240, "batch": 32}
STUDENT: dict[str, Any] = {"steps": 120, "batch": 32}
SFT: dict[str, Any] = {"train": "sft", "rate": 0.01, "length": 48, "held_out": HELD_OUT}
ASKED = 700
"""Questions that the teacher is asked."""
DEPTH25 = {
    "stages": [{"transform": "depth", "drop": 0.25}],
    "calibration": {"samples": 64, "length": 128, "held_out": 2},
}
SAMPLES = 5
MOST_TOKENS = 32


def train(model: Path, teacher: Path, rows: Sequence[Any], size: Any, out: Path) -> Path:
    """`model` after learning the completions of rows."""
    from compress_methods import recover
    from compress_methods.recipe.training import parse_training

    data = write_rows(out.with_suffix(".jsonl"), rows)
    learnt = {"data": str(data), "sequences": len(rows) - 2 * HELD_OUT}
    settings = parse_training({**SFT, **size, **learnt}, out.name)
    recover(model, teacher, out, settings, device="cpu", quiet=True)
    return out


def lesson(question: Question) -> dict[str, str]:
    return {"prompt": question.prompt, "completion": question.thought}


def written(teacher: Path, asked: Iterable[Question], folder: Path) -> list[dict[str, Any]]:
    """What `vllm-compress teach` has a served teacher write."""
    from vllm_compress.cli import main

    seeds, out = folder / "seeds.jsonl", folder / "written.jsonl"
    write_rows(seeds, ({"prompt": q.prompt, "answer": q.answer} for q in asked))
    options = ["--style", "cot", "--ask", "", "--mark", MARK, "--samples", str(SAMPLES)]
    options += ["--max-tokens", str(MOST_TOKENS), "--completions", "--logprobs", "0", "--quiet"]
    with VllmServer(teacher, env=FEWER_PROCESSES) as server:
        if main(["teach", server.url, "--seeds", str(seeds), *options, "-o", str(out)]):
            raise RuntimeError("teach has failed")
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def exact_match(model: Path, asked: Sequence[Question]) -> float:
    """Share of questions whose true answer stands behind the mark, by greedy decoding."""
    import torch

    from compress_methods.calibration.tokenizer import load_tokenizer
    from compress_methods.checkpoint.loading.model import load_model

    tokenizer, loaded = load_tokenizer(model), load_model(model)
    by_length: dict[int, list[tuple[Question, list[int]]]] = defaultdict(list)
    for question in asked:
        ids = tokenizer(question.prompt)["input_ids"]
        by_length[len(ids)].append((question, ids))
    right = 0
    for length, some in by_length.items():
        given = torch.tensor([ids for _, ids in some])
        ended = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.eos_token_id}
        ended["attention_mask"] = torch.ones_like(given)
        found = loaded.generate(given, do_sample=False, max_new_tokens=MOST_TOKENS, **ended)
        texts = tokenizer.batch_decode(found[:, length:], skip_special_tokens=True)
        for (question, _), text in zip(some, texts, strict=True):
            right += text.partition(MARK)[2].strip() == question.answer
    return right / len(asked)


def run() -> dict[str, Any]:
    from compress_methods import convert

    began = time.monotonic()
    pools = {name: questions(steps) for name, (steps, _) in TESTED.items()}
    tests = {name: pools[name][:count] for name, (_, count) in TESTED.items()}
    taught = [q for name, (_, count) in TESTED.items() for q in pools[name][count:]]
    rows: list[dict[str, Any]] = []

    def measure(name: str, model: Path, lines: int) -> None:
        matches = {test: exact_match(model, asked) for test, asked in tests.items()}
        rows.append({"model": name, "lines": lines, "matches": matches})
        print(rows[-1], flush=True)

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        teacher = train(MODEL, MODEL, [*map(lesson, taught)], TEACHER, folder / "teacher")
        measure("teacher", teacher, len(taught))
        asked = [*taught[: ASKED // 7], *taught[-ASKED + ASKED // 7 :]]
        steps = written(teacher, asked, folder)
        answers = [{**line, "completion": f" {MARK} {line['answer']}"} for line in steps]
        pruned = folder / "pruned"
        text = folder / "teacher.jsonl"
        convert(teacher, DEPTH25, pruned, calibration=text, quiet=True)
        measure("pruned, not trained", pruned, 0)
        for name, data in (("steps", steps), ("answers", answers)):
            out = train(pruned, teacher, data, STUDENT, folder / name)
            measure(f"pruned, trained on {name}", out, len(data))
    return {
        "model": MODEL.name,
        "tests": {name: len(asked) for name, asked in tests.items()},
        "samples": SAMPLES,
        "seconds": time.monotonic() - began,
        "rows": rows,
    }


def table(results: dict[str, Any]) -> str:
    tests: Mapping[str, int] = results["tests"]
    heads = [f"{name}, {count} questions" for name, count in tests.items()]
    lines = [f"| model | lines learnt | {' | '.join(heads)} |", "|---" * (2 + len(heads)) + "|"]
    for row in results["rows"]:
        cells = " | ".join(f"{row['matches'][name]:.1%}" for name in tests)
        lines.append(f"| {row['model']} | {row['lines']:,} | {cells} |")
    return "\n".join(lines)
