"""One run of `teach` as its styles see it: seeds, settings, and answers to what they ask.

Every answer is written to the journal as it comes, and none that is there is asked for again. Once
something ends the run no new request is sent; those under way may still answer, for they are paid.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from compress_methods.evaluation.served import ServerError
from compress_methods.system.progress import Progress
from vllm_compress.operations.abtest.scoring.scores import Scorer, apply_scorer
from vllm_compress.operations.journal import Journal
from vllm_compress.operations.teaching.cost import Bill
from vllm_compress.operations.teaching.overlap import HeldOut
from vllm_compress.operations.teaching.seeds import Message, Seed
from vllm_compress.operations.teaching.settings import TeachSettings
from vllm_compress.operations.teaching.teacher import (
    Answer,
    Refused,
    Request,
    Teacher,
    find_model,
)
from vllm_compress.operations.teaching.voting import same_answer

ASKED, TEACHER = "asked", "teacher"
FEW = 5
"""So many refusals before any answer mean that all would be refused."""


@dataclass(frozen=True)
class Line:
    """A line of the data: what is asked, what the teacher says, and the answer in it. `seeds` are
    the lines of the file of seeds it came from."""

    messages: tuple[Message, ...]
    text: str
    answer: str
    seeds: tuple[int, ...]
    logprobs: str | None


@dataclass
class Lesson:
    """`dropped` counts, by reason, what was answered and is not taught."""

    settings: TeachSettings
    seeds: list[Seed]
    teacher: Teacher
    journal: Journal
    held_out: HeldOut | None
    bill: Bill
    check: Scorer | None = None
    exact: bool = False
    dropped: Counter[str] = field(default_factory=Counter)
    notes: dict[str, Any] = field(default_factory=dict)

    def progress(self, total: int, label: str) -> Progress:
        return Progress(total, label, sys.stderr, quiet=self.settings.quiet)

    async def ask(
        self, requests: Sequence[Request], progress: Progress | None = None
    ) -> dict[str, Answer]:
        """The answers by the names of their requests, without those that were refused, which are
        counted. `progress` counts requests."""
        known = {r.name: self._known(r) for r in requests}
        found = {name: answer for name, answer in known.items() if answer is not None}
        if progress is not None:
            progress.skip(len(found))
        left = deque(r for r in requests if r.name not in found)
        problems: list[ServerError] = []
        refusals: list[str] = []

        async def work() -> None:
            while left and not problems:
                request = left.popleft()
                try:
                    answer = await self.teacher.ask(request)
                except Refused as problem:
                    refusals.append(str(problem))
                    if len(refusals) >= FEW and not found:
                        problems.append(self._refuses(refusals))
                except ServerError as problem:
                    problems.append(problem)
                    self.teacher.stopped = True
                    return
                else:
                    self._keep(request, answer)
                    found[request.name] = answer
                if progress is not None:
                    progress.step(note=self.bill.note())

        if left:
            self._find_teacher()
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self.settings.parallel, len(left))):
                    group.create_task(work())
        except ExceptionGroup as group_of_problems:
            raise group_of_problems.exceptions[0] from None
        if not problems and refusals and not found:
            problems.append(self._refuses(refusals))
        if problems:
            raise problems[0]
        if refusals:
            self.dropped["requests refused"] += len(refusals)
            self.notes["refusal"] = refusals[-1]
        return found

    def usable(self, answer: Answer) -> bool:
        """Tell whether an answer can be taught; what cannot is counted."""
        reason = ""
        if not answer.whole:
            reason = "answers cut off"
        elif not answer.text.strip() or not _is_text(answer.text):
            reason = "answers without text"
        if reason:
            self.dropped[reason] += 1
        return not reason

    def right(self, seed: Seed, answer: str) -> bool:
        """Tell whether an answer is right, as far as the user has it checked."""
        if self.check is not None:
            return apply_scorer(self.check, seed.row, answer, seed.where) == 1
        if not self.exact:
            return True
        return seed.answer is not None and same_answer(answer, seed.answer)

    def overlaps(self, question: str, answer: str = "") -> bool:
        """Tell whether the held-out text has this as well."""
        return self.held_out is not None and self.held_out.overlaps(question, answer)

    def _find_teacher(self) -> None:
        """Find out what is served, before the first request of a run: what was before, still."""
        if self.teacher.model:
            return
        url = self.teacher.endpoint.url
        model, is_vllm = find_model(url, self.settings.model)
        noted = self.journal.notes.get(TEACHER, model)
        if noted != model:
            raise ServerError(
                f"{url}: serves {model}, and the answers of {self.journal.directory} are those of "
                f"{noted}; choose another file with -o"
            )
        self.journal.note(**{TEACHER: model})
        self.teacher.model, self.teacher.is_vllm = model, is_vllm

    def _refuses(self, refusals: list[str]) -> ServerError:
        return ServerError(f"{self.teacher.endpoint.url}: answers no request; {refusals[-1]}")

    def _known(self, request: Request) -> Answer | None:
        """The journal's answer, if it is one to the very same request."""
        line = self.journal.records.get(ASKED, {}).get(request.name)
        if line is None or line["request"] != _digest(request):
            return None
        return Answer(**line["answer"])

    def _keep(self, request: Request, answer: Answer) -> None:
        self.journal.record(ASKED, request.name, request=_digest(request), answer=asdict(answer))
        self.bill.add(answer.tokens_in, answer.tokens_out)


def _is_text(text: str) -> bool:
    """Tell whether UTF-8 can hold it: JSON may hold half a character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _digest(request: Request) -> str:
    sent = json.dumps([request.messages, request.temperature])
    return hashlib.sha256(sent.encode()).hexdigest()[:16]
