"""Instruction following: the teacher grows a few instructions into many, then answers them.

    grow      a request shows instructions drawn from the seeds and from those grown so far, and
              asks for new ones that differ; a round sends several, and what it brings is shown by
              the next
    filter    none that says nearly what a seed or an earlier one says (`novelty.py`), none of the
              held-out text, none too short or too long to be one
    answer    every new instruction by itself

As in self-instruct (Wang et al., ACL 2023, arXiv:2212.10560), with MinHash where they compare all
with all, and without their classification of tasks. Rounds depend only on the seeds, `--seed` and
the answers, never on how many requests run at once: a run goes on where it was killed.

Needs: a teacher that follows instructions. Fails where: the seeds are few and alike, so that what
grows is, too; it then stops early and says so.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_compress.operations.teaching.lesson import Lesson, Line
from vllm_compress.operations.teaching.novelty import Novelty
from vllm_compress.operations.teaching.similarity import words
from vllm_compress.operations.teaching.teacher import Answer, Request

GROWING, ANSWERING = 1.0, 0.0
"""Temperatures."""
FROM_SEEDS, FROM_GROWN = 6, 2
WANTED = 4
ROUND = 16
VAIN_ROUNDS = 3
SHORTEST, LONGEST = 3, 150
"""Words of an instruction."""
NUMBERED = re.compile(r"^\s*\**\d+[.):]\**\s*(.+?)\s*$", re.MULTILINE)
ASK = """\
These are instructions that people give to an assistant, one a line:

{shown}

Write {wanted} new ones. Each has to be a task that can be solved by text alone and without further
material, and has to differ from all above and from each other in what it is about and in how it is
worded. Write each on one line of its own, numbered from 1, and nothing else."""


@dataclass(frozen=True)
class Grown:
    """An instruction, and the lines of the seeds that stood before the teacher when it grew."""

    text: str
    seeds: tuple[int, ...]


async def teach(lesson: Lesson) -> list[Line]:
    """Grow instructions, then have them answered."""
    settings = lesson.settings
    grown = await grow(lesson)
    temperature = ANSWERING if settings.temperature is None else settings.temperature
    messages = {g.text: ({"role": "user", "content": g.text},) for g in grown}
    requests = [Request(_name(g.text), messages[g.text], temperature) for g in grown]
    with lesson.progress(len(requests), "answering") as progress:
        answers = await lesson.ask(requests, progress)
    lines = []
    for one, request in zip(grown, requests, strict=True):
        answer = answers.get(request.name)
        if answer is not None and lesson.usable(answer):
            text = answer.text.strip()
            lines.append(Line(request.messages, answer.text, text, one.seeds, answer.logprobs))
    return lines


async def grow(lesson: Lesson) -> list[Grown]:
    """New instructions, as many as asked for unless nothing new comes any more."""
    count, grown = lesson.settings.count, list[Grown]()
    novelty = Novelty()
    for seed in lesson.seeds:
        novelty.add(seed.question)
    number = vain = 0
    with lesson.progress(count, "growing instructions") as progress:
        while len(grown) < count and vain < VAIN_ROUNDS:
            before = len(grown)
            requests, shown = _round(lesson, grown, number)
            answers = await lesson.ask(requests)
            for request, seeds in zip(requests, shown, strict=True):
                if request.name in answers:
                    new = _new(lesson, novelty, answers[request.name])
                    grown += [Grown(text, seeds) for text in new]
            del grown[count:]
            progress.step(len(grown) - before, lesson.bill.note())
            number += 1
            vain = 0 if len(grown) > before else vain + 1
    lesson.notes |= {"grown": len(grown), "wanted": count}
    return grown


def _round(
    lesson: Lesson, grown: Sequence[Grown], number: int
) -> tuple[list[Request], list[tuple[int, ...]]]:
    """The requests of a round, and the lines of the seeds that each shows."""
    settings = lesson.settings
    temperature = GROWING if settings.temperature is None else settings.temperature
    missing = settings.count - len(grown)
    requests, seeds = [], []
    for i in range(min(ROUND, -(-missing // WANTED))):
        chance = random.Random(f"{settings.seed}/{number}/{i}")
        drawn = chance.sample(lesson.seeds, min(FROM_SEEDS, len(lesson.seeds)))
        texts = [seed.question for seed in drawn]
        texts += [g.text for g in chance.sample(grown, min(FROM_GROWN, len(grown)))]
        chance.shuffle(texts)
        shown = "\n".join(f"{j}. {' '.join(text.split())}" for j, text in enumerate(texts, 1))
        content = ASK.format(shown=shown, wanted=WANTED)
        message = {"role": "user", "content": content}
        requests.append(Request(f"grow/{number}/{i}", (message,), temperature))
        seeds.append(tuple(seed.line for seed in drawn))
    return requests, seeds


def _name(instruction: str) -> str:
    """The name of the request that has it answered, whatever else grew before it."""
    return f"answer/{hashlib.sha256(instruction.encode()).hexdigest()[:16]}"


def _new(lesson: Lesson, novelty: Novelty, answer: Answer) -> list[str]:
    """The instructions of an answer that pass all filters; the others are counted."""
    found = []
    instructions = NUMBERED.findall(answer.text.encode(errors="replace").decode())
    for instruction in instructions if answer.whole else instructions[:-1]:
        if not SHORTEST <= len(words(instruction)) <= LONGEST:
            lesson.dropped["instructions too short or too long"] += 1
        elif lesson.overlaps(instruction):
            lesson.dropped["instructions held out"] += 1
        elif not novelty.add(instruction):
            lesson.dropped["instructions that repeat"] += 1
        else:
            found.append(instruction)
    return found
