"""Questions with answers, of which a student is to learn the answers: files of `train: sft`.

    {"messages": [..., {"role": "assistant", "content": "..."}]}   and "tools"; ShareGPT's
                                                                   conversations, too
    {"prompt": "...", "completion": "..."}
    {"instruction": "...", "input": "...", "output": "..."}

as `vllm-compress teach` writes them. Messages go through the tokenizer's chat template as a server
would send them; the answer is what the template then adds for the last message. An answer that the
template does not end gets an EOS. With `loss: topk_kl` each line has `logprobs` as `teach` writes
them, with ids, and the answer is their tokens.

Fails where: a template writes the question otherwise once an answer follows; only the last of
several answers is learnt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress_methods.calibration.chat import render
from compress_methods.calibration.rows import Chat, read_row
from compress_methods.calibration.text import ENDING, encode, jsonl_rows
from compress_methods.calibration.tokenizer import leading_bos
from compress_methods.errors import CalibrationError
from compress_methods.recipe.training import TOPK_KL, Training

TOKENS, COUNTED = "input_ids", "counted"
TOP_TOKENS, TOP_LOGPROBS = "top_tokens", "top_logprobs"
LOGPROBS = "logprobs"
ASSISTANT = "assistant"
Row = Mapping[str, Tensor]


def holds_lessons(path: Path) -> bool:
    """Whether the first line of a file is a question with its answer, not plain text."""
    if path.suffix != ".jsonl" or not path.is_file():
        return False
    _, row = next(jsonl_rows(path), (None, None))
    return isinstance(row, Mapping) and "text" not in row


def read_lessons(path: Path, tokenizer: Any, settings: Training) -> list[Row]:
    """Rows to learn from, to stop by and to report on, drawn from the seed; `CalibrationError`
    names file, line and field."""
    found = [_row(row, where, tokenizer, settings) for where, row in jsonl_rows(path)]
    wanted = settings.text.rows
    if len(found) < wanted:
        rest = len(found) - 2 * settings.held_out
        fits = f"sequences: {rest} fits" if rest > 0 else "give more, or a smaller held_out"
        raise CalibrationError(
            f"{path}: {len(found)} answers, expected {wanted} ({settings.sequences} sequences and "
            f"2 x {settings.held_out} held-out ones); {fits}"
        )
    generator = torch.Generator().manual_seed(settings.seed)
    order = torch.randperm(len(found), generator=generator)
    return [found[i] for i in order[:wanted].tolist()]


def _row(row: Any, where: str, tokenizer: Any, settings: Training) -> Row:
    prompt, answer = _split(row, where, tokenizer)
    bos = leading_bos(tokenizer)
    before = [*([] if bos is None else [bos]), *encode(tokenizer, prompt)]
    if not before:
        raise CalibrationError(f"{where}: has an answer to nothing")
    tops: dict[str, Tensor] = {}
    if settings.loss == TOPK_KL:
        said, tops = _logprobs(row, answer, where, tokenizer, len(before))
    else:
        said = _ended(encode(tokenizer, answer), tokenizer)
    length = len(before) + len(said)
    if length > settings.length:
        raise CalibrationError(
            f"{where}: has {length} tokens, length is {settings.length}; give at least {length}"
        )
    counted = torch.arange(length) >= len(before)
    return {TOKENS: torch.tensor([*before, *said]), COUNTED: counted, **tops}


def _split(row: Any, where: str, tokenizer: Any) -> tuple[str, str]:
    """What is asked and what is to be answered, as text."""
    found = read_row(row, where)
    if isinstance(found, Chat):
        return _turn(found, where, tokenizer)
    if "text" in row:
        raise CalibrationError(f"{where}: has text, expected an answer as in the lines before")
    alpaca = all(row.get(key) is not None for key in ("instruction", "output"))
    key = "output" if alpaca else "completion"
    answer = row.get(key)
    if not answer or not answer.strip():
        raise CalibrationError(f"{where}: {key} is empty, expected an answer")
    return found.removesuffix(answer), answer


def _turn(chat: Chat, where: str, tokenizer: Any) -> tuple[str, str]:
    if len(chat.messages) < 2 or chat.messages[-1].get("role") != ASSISTANT:
        raise CalibrationError(
            f"{where}: messages end without an answer, expected a question and the assistant's"
        )
    if not chat.messages[-1]["content"].strip():
        raise CalibrationError(f"{where}: content of the last message is empty")
    prompt = render(Chat(chat.messages[:-1], chat.tools), where, tokenizer, prompt=True)
    whole = render(chat, where, tokenizer)
    if not whole.startswith(prompt):
        raise CalibrationError(
            f"{where}: the chat template writes the question otherwise where an answer follows; "
            "give prompt and completion instead"
        )
    return prompt, whole.removeprefix(prompt)


def _ended(ids: list[int], tokenizer: Any) -> list[int]:
    eos = tokenizer.eos_token_id
    return ids if eos is None or eos in ids[-ENDING:] else [*ids, eos]


def _logprobs(
    row: Any, answer: str, where: str, tokenizer: Any, before: int
) -> tuple[list[int], dict[str, Tensor]]:
    """The answer's tokens, and what the teacher found likeliest at each place that predicts one."""
    block = row.get(LOGPROBS)
    if not isinstance(block, Mapping) or not block.get("ids"):
        found = "none" if not isinstance(block, Mapping) else "texts"
        raise CalibrationError(
            f"{where}: {LOGPROBS} has {found}, expected ids of tokens; use `loss: ce` without them"
        )
    keys = ("tokens", TOP_TOKENS, TOP_LOGPROBS)
    said, names, values = (_listed(block, key, where) for key in keys)
    likely = list(zip(names, values, strict=False))
    even = len(said) == len(names) == len(values) and all(len(n) == len(v) for n, v in likely)
    if not said or not even:
        raise CalibrationError(f"{where}: {LOGPROBS} has lists of different lengths")
    ids = [*said, *(i for one in names for i in one)]
    if not all(isinstance(i, int) and 0 <= i < len(tokenizer) for i in ids):
        raise CalibrationError(f"{where}: {LOGPROBS} names tokens that the student does not have")
    spelt = tokenizer.decode(said, skip_special_tokens=True).strip()
    if spelt and spelt not in answer:
        raise CalibrationError(
            f"{where}: tokens of {LOGPROBS} do not spell the answer: another tokenizer's"
        )
    count = max(map(len, names))
    shape = before + len(said), count
    tokens, logprobs = torch.zeros(shape, dtype=torch.int64), torch.full(shape, -math.inf)
    for i, (own, sizes) in enumerate(likely, before - 1):
        tokens[i, : len(own)] = torch.tensor(own, dtype=torch.int64)
        logprobs[i, : len(own)] = torch.tensor(sizes)
    return list(said), {TOP_TOKENS: tokens, TOP_LOGPROBS: logprobs}


def _listed(block: Mapping[str, Any], key: str, where: str) -> list[Any]:
    found = block.get(key)
    if not isinstance(found, list):
        raise CalibrationError(f"{where}: {LOGPROBS} lacks {key}, expected a list")
    return found
