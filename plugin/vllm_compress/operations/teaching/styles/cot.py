"""Chain of thought: the teacher writes down how it gets to an answer, and only right ones count.

    ask       each question, with the request to think in steps and to end with a marked answer,
              several times at a temperature
    vote      the answer that most samples end with (`voting.py`); none where two lead
    check     against the known answer, or by the user's function; a wrong one drops the question
    keep      up to so many different texts that end with the answer

A student trained on question and text learns to reason (Ho et al. 2022, "Large language models are
reasoning teachers", arXiv:2212.10071; Hsieh et al. 2023, "Distilling step-by-step",
arXiv:2305.02301; for texts that come to the known answer, Zelikman et al. 2022, "STaR",
arXiv:2203.14465). The request for steps is not part of the data.

Needs: seeds with an answer, or a function, or `--check none`, which trusts the vote.
Fails where: a wrong way leads to the right answer, as with few answers to choose from.
"""

from __future__ import annotations

from collections.abc import Sequence

from vllm_compress.operations.teaching.lesson import Lesson, Line
from vllm_compress.operations.teaching.seeds import Message, Seed
from vllm_compress.operations.teaching.settings import TeachSettings
from vllm_compress.operations.teaching.teacher import Answer, Request
from vllm_compress.operations.teaching.voting import final_answer, majority, same_answer

TEMPERATURE = 0.7


async def teach(lesson: Lesson) -> list[Line]:
    """Ask every seed's question several times, vote and check."""
    settings = lesson.settings
    temperature = TEMPERATURE if settings.temperature is None else settings.temperature
    requests = {
        seed.line: [
            Request(f"cot/{seed.line}/{number}", layout(seed, settings), temperature)
            for number in range(settings.samples)
        ]
        for seed in lesson.seeds
    }
    every = [request for group in requests.values() for request in group]
    with lesson.progress(len(every), "asking") as progress:
        answers = await lesson.ask(every, progress)
    lines = []
    for seed in lesson.seeds:
        samples = [answers[r.name] for r in requests[seed.line] if r.name in answers]
        lines += _lines(lesson, seed, samples)
    return lines


def layout(seed: Seed, settings: TeachSettings) -> tuple[Message, ...]:
    """What is sent: the seed's messages, the last with the request to think."""
    ask = settings.ask.replace("{mark}", settings.mark).strip()
    content = f"{seed.question}\n\n{ask}" if ask else seed.question
    return (*seed.messages[:-1], {"role": "user", "content": content})


def _lines(lesson: Lesson, seed: Seed, samples: Sequence[Answer]) -> list[Line]:
    """The texts of a question that are taught, counting why the others are not."""
    settings = lesson.settings
    whole = [sample for sample in samples if lesson.usable(sample)]
    finals = [final_answer(sample.text, settings.mark) for sample in whole]
    lesson.dropped["answers without a final one"] += finals.count(None)
    won = majority(finals)
    if won is None:
        lesson.dropped["questions without a majority"] += any(final is not None for final in finals)
        return []
    if not lesson.right(seed, won):
        lesson.dropped["questions answered wrongly"] += 1
        return []
    texts: dict[str, Line] = {}
    for sample, final in zip(whole, finals, strict=True):
        if final is not None and same_answer(final, won):
            line = Line(seed.messages, sample.text, won, (seed.line,), sample.logprobs)
            texts.setdefault(sample.text, line)
        elif final is not None:
            lesson.dropped["answers outvoted"] += 1
    return list(texts.values())[: settings.keep]
