"""A whole run of `teach`: check everything that can be wrong, ask, filter, write.

All files and options are read before the server is asked. The data is written when all is
answered, in one step; until then, and afterwards, the answers are in a journal beside it. The same
command continues a run that was killed, and on a finished one filters again, which asks nothing: so
--check, --keep and prices may be changed. With other settings it is refused.

A line of the data is a JSON object:

    messages   the chat that ends with the teacher's answer (TRL's conversational format), or, with
               --completions, prompt and completion
    style      icl, cot or instruct
    seed       lines of the file of seeds it came from, the question's first
    answer     the final answer: what a chain of thought comes to, else all of the answer
    logprobs   where the endpoint gives them, see `logprobs.py`
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import httpx

from compress_methods.errors import OutputError
from compress_methods.evaluation.served import ServerError
from compress_methods.system.files import replacing
from compress_methods.system.http import KEY_VARIABLE
from compress_methods.system.progress import Progress
from compress_methods.system.user_file import require_path
from vllm_compress.operations.abtest.scoring.scores import Scorer, load_scorer
from vllm_compress.operations.journal import Journal, Words
from vllm_compress.operations.teaching import styles
from vllm_compress.operations.teaching.cost import Bill
from vllm_compress.operations.teaching.layout import BETWEEN, as_text
from vllm_compress.operations.teaching.lesson import ASKED, TEACHER, Lesson, Line
from vllm_compress.operations.teaching.overlap import HeldOut, read_held_out
from vllm_compress.operations.teaching.seeds import Seed, Seeds, SeedsError, read_seeds
from vllm_compress.operations.teaching.settings import COT, EXACT, NO_CHECK, TeachSettings
from vllm_compress.operations.teaching.teacher import TIMEOUT, Endpoint, Teacher

WORDS = Words(
    doing="writing into it",
    earlier="the journal of an earlier run",
    held="answers",
    others="seeds or settings",
    instead="choose another file with -o or delete this directory",
)


def teach(settings: TeachSettings) -> dict[str, Any]:
    """Run, continue or filter again; write the data and return the summary. Raises a
    `CompressError`."""
    _check_url(settings.url)
    _check_out(settings)
    check, exact = _check(settings)
    read = read_seeds(settings.seeds)
    held_out = None
    if settings.held_out is not None:
        held_out = read_held_out(settings.held_out, settings.overlap)
    seeds = _usable_seeds(read, held_out, settings)
    if exact:
        _require_answers(seeds)
    bill = Bill(settings.price_in, settings.price_out)
    with Journal(settings.work, settings.fingerprint(), WORDS, durable=True) as journal:
        _check_unclaimed(settings, journal)
        for line in journal.records.get(ASKED, {}).values():
            bill.add(line["answer"]["tokens_in"], line["answer"]["tokens_out"])
        teacher = _teacher(settings)
        lesson = Lesson(settings, seeds, teacher, journal, held_out, bill, check, exact)
        kept = list(_apart(lesson, _lines(lesson)))
        if not kept:
            raise OutputError(f"{settings.out}: no line is left of it ({_reasons(lesson)})")
        with replacing(settings.out) as file:
            for one in kept:
                file.write(_encode(one, settings))
        return _summary(lesson, read, kept)


def _teacher(settings: TeachSettings) -> Teacher:
    said: set[str] = set()

    def say(line: str) -> None:
        if not settings.quiet and line not in said:
            Progress.write(line, file=sys.stderr)
        said.add(line)

    endpoint = Endpoint(
        settings.server,
        settings.completions,
        settings.max_tokens,
        settings.logprobs,
        settings.rate,
        settings.stop or ((BETWEEN,) if settings.completions else ()),
        say,
    )
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=settings.parallel)
    return Teacher(endpoint, httpx.AsyncClient(timeout=TIMEOUT, limits=limits))


def _lines(lesson: Lesson) -> list[Line]:
    """All lines of the style, before the last look at what is held out."""
    module = import_module(f"{styles.__name__}.{lesson.settings.style}")

    async def ask() -> list[Line]:
        async with lesson.teacher.client:
            lines: list[Line] = await module.teach(lesson)
            return lines

    try:
        return asyncio.run(ask())
    except ServerError as problem:
        if not lesson.bill.answers:
            raise
        raise ServerError(
            f"{problem}; {lesson.bill.answers:,} answers are kept in {lesson.settings.work}, the "
            "same command continues"
        ) from problem


def _check_url(url: str) -> None:
    """Refuse a password in a URL, which errors and the journal would tell."""
    if "@" in url.partition("://")[2].partition("/")[0]:
        raise ServerError(f"URL holds a user or a password, expected the key in {KEY_VARIABLE}")


def _check_out(settings: TeachSettings) -> None:
    """Raise `OutputError` where the data could not be written at the end."""
    require_path(settings.out, OutputError)
    require_path(settings.work, OutputError)
    if settings.out.suffix != ".jsonl":
        raise OutputError(
            f"{settings.out}: ends in {settings.out.suffix or 'nothing'!r}, expected .jsonl"
        )
    if settings.out.is_dir():
        raise OutputError(f"{settings.out}: is a directory, expected a file to write")
    if not settings.out.absolute().parent.is_dir():
        raise OutputError(f"{settings.out.parent}: no such directory to write to")


def _check_unclaimed(settings: TeachSettings, journal: Journal) -> None:
    """Raise `OutputError` rather than overwrite a file that no earlier run wrote."""
    if settings.out.exists() and not journal.records:
        raise OutputError(
            f"{settings.out}: is there, and no earlier run's; choose another with -o or delete it"
        )


def _check(settings: TeachSettings) -> tuple[Scorer | None, bool]:
    """The user's function, or whether answers have to be the known ones."""
    check = settings.check or (EXACT if settings.style == COT else NO_CHECK)
    if check in (EXACT, NO_CHECK):
        return None, check == EXACT
    return load_scorer(check, "--check"), False


def _usable_seeds(read: Seeds, held_out: HeldOut | None, settings: TeachSettings) -> list[Seed]:
    """Seeds that the held-out text does not have."""
    if settings.completions:
        for seed in read.seeds:
            if "messages" in seed.row and seed.row["messages"] is not None:
                raise SeedsError(
                    f"{seed.where}: found messages, expected prompt or instruction with "
                    "--completions"
                )
    seeds = [
        seed
        for seed in read.seeds
        if held_out is None or not held_out.overlaps(seed.question, seed.answer or "")
    ]
    if not seeds:
        raise SeedsError(f"{settings.seeds}: {settings.held_out} has every one of its seeds")
    return seeds


def _require_answers(seeds: list[Seed]) -> None:
    for seed in seeds:
        if seed.answer is None:
            raise SeedsError(
                f"{seed.where}: has no answer to check by; expected `answer`, --check "
                "FILE.py:FUNCTION or --check none"
            )


def _apart(lesson: Lesson, lines: list[Line]) -> Iterator[Line]:
    """The lines that the held-out text does not have; the others are counted."""
    for line in lines:
        if lesson.overlaps(line.messages[-1]["content"], line.text):
            lesson.dropped["lines held out"] += 1
        else:
            yield line


def _encode(line: Line, settings: TeachSettings) -> bytes:
    """A line of the data."""
    block: dict[str, Any]
    if settings.completions:
        block = {"prompt": as_text(line.messages), "completion": line.text}
    else:
        block = {"messages": [*line.messages, {"role": "assistant", "content": line.text}]}
    block |= {"style": settings.style, "seed": list(line.seeds), "answer": line.answer}
    if line.logprobs is not None:
        block["logprobs"] = json.loads(line.logprobs)
    text = json.dumps(block, ensure_ascii=False)
    # Tokens may be parts of characters; JSON has an escape for those.
    return text.encode(errors="backslashreplace") + b"\n"


def _reasons(lesson: Lesson) -> str:
    found = [f"{n:,} {reason}" for reason, n in lesson.dropped.items() if n]
    return ", ".join(found) or "no answer"


def _summary(lesson: Lesson, read: Seeds, kept: list[Line]) -> dict[str, Any]:
    """What the command prints."""
    settings = lesson.settings
    return {
        "file": str(settings.out),
        "style": settings.style,
        "teacher": lesson.journal.notes[TEACHER],
        "lines": len(kept),
        "lines_with_logprobs": sum(line.logprobs is not None for line in kept),
        "seeds": len(lesson.seeds),
        "seeds_repeated": read.repeated,
        "seeds_held_out": len(read.seeds) - len(lesson.seeds),
        "dropped": {reason: n for reason, n in sorted(lesson.dropped.items()) if n},
        "retries": lesson.teacher.retries,
        **lesson.bill.to_dict(),
        **lesson.notes,
    }
