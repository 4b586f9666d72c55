"""In-context learning: the teacher sees demonstrations, and the student learns to do without.

Before each question stand k others with their known answers. The teacher infers the task from them;
a student trained on its answers, without the demonstrations, has them in its weights (Snell et al.
2022, "Learning by distilling context", arXiv:2209.15189), or keeps the skill of reading them where
they are kept (Huang et al. 2022, "In-context learning distillation", arXiv:2212.10670).

    similar   the k nearest by the cosine of tf-idf, the nearest last, next to the question (Liu et
              al. 2021, arXiv:2101.06804)
    random    k drawn for each question

Needs: more than k seeds with an answer. A question is never its own demonstration.
Fails where: the task is not to be told from k examples.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import islice

import numpy as np

from vllm_compress.operations.teaching.lesson import Lesson, Line
from vllm_compress.operations.teaching.seeds import Message, Seed, SeedsError
from vllm_compress.operations.teaching.settings import SIMILAR
from vllm_compress.operations.teaching.similarity import Similarity
from vllm_compress.operations.teaching.teacher import Request

TEMPERATURE = 0.0


async def teach(lesson: Lesson) -> list[Line]:
    """Ask every seed's question behind its demonstrations."""
    settings = lesson.settings
    shown = choose(lesson.seeds, settings.demonstrations, settings.select, settings.seed)
    temperature = TEMPERATURE if settings.temperature is None else settings.temperature
    requests = {
        seed.line: Request(f"icl/{seed.line}", layout(seed, examples), temperature)
        for seed, examples in zip(lesson.seeds, shown, strict=True)
    }
    with lesson.progress(len(requests), "asking") as progress:
        answers = await lesson.ask(list(requests.values()), progress)
    lines = []
    for seed, examples in zip(lesson.seeds, shown, strict=True):
        request = requests[seed.line]
        if (answer := answers.get(request.name)) is None or not lesson.usable(answer):
            continue
        text = answer.text.strip()
        if not lesson.right(seed, text):
            lesson.dropped["questions answered wrongly"] += 1
            continue
        messages = request.messages if settings.keep_demonstrations else seed.messages
        came_from = (seed.line, *(example.line for example in examples))
        lines.append(Line(messages, answer.text, text, came_from, answer.logprobs))
    return lines


def choose(seeds: Sequence[Seed], k: int, how: str, chance: int) -> list[list[Seed]]:
    """For each seed the k seeds to show before it; raises `SeedsError` where there are too few."""
    known = [i for i, seed in enumerate(seeds) if seed.answer is not None]
    if len(known) <= k:
        file = seeds[0].where.rpartition(":")[0]
        raise SeedsError(
            f"{file}: {len(known)} seeds with an answer, expected {k + 1} for --demonstrations {k}"
        )
    if how != SIMILAR:
        draws = [random.Random(f"{chance}/{seed.line}") for seed in seeds]
        others = [[j for j in known if j != i] for i in range(len(seeds))]
        return [
            [seeds[j] for j in draw.sample(those, k)]
            for draw, those in zip(draws, others, strict=True)
        ]
    similarity = Similarity([seed.question for seed in seeds])
    found = []
    for i in range(len(seeds)):
        nearest = np.argsort(-similarity.to(i), kind="stable").tolist()
        order = (j for j in nearest if j != i and seeds[j].answer is not None)
        found.append([seeds[j] for j in islice(order, k)][::-1])
    return found


def layout(seed: Seed, examples: Sequence[Seed]) -> tuple[Message, ...]:
    """What is sent: the seed's system message, examples as turns of the chat, its question."""
    system = [m for m in seed.messages[:1] if m["role"] == "system"]
    turns = []
    for example in examples:
        assert example.answer is not None
        turns.append({"role": "user", "content": example.question})
        turns.append({"role": "assistant", "content": example.answer})
    return (*system, *turns, *seed.messages[len(system) :])
