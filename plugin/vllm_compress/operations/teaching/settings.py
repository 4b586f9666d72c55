"""What the user asks of `teach`, and what of it decides the answers."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ICL, COT, INSTRUCT = "icl", "cot", "instruct"
STYLES = (ICL, COT, INSTRUCT)
SIMILAR, RANDOM = "similar", "random"
EXACT, NO_CHECK = "exact", "none"
ASK = (
    "Think step by step and write your steps down. Then end with one line that holds nothing but "
    "`{mark} ` and the final answer."
)
MARK = "Answer:"


@dataclass(frozen=True)
class TeachSettings:
    """`temperature`, `check` and `logprobs` None: what the style does by itself, and as many
    log-probabilities as the endpoint gives. Prices are of a million tokens."""

    url: str
    seeds: Path
    style: str
    out: Path
    model: str | None = None
    completions: bool = False
    demonstrations: int = 4
    select: str = SIMILAR
    keep_demonstrations: bool = False
    samples: int = 5
    keep: int = 1
    check: str | None = None
    ask: str = ASK
    mark: str = MARK
    count: int = 100
    temperature: float | None = None
    max_tokens: int = 512
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    parallel: int = 8
    rate: float | None = None
    held_out: Path | None = None
    overlap: int = 13
    price_in: float | None = None
    price_out: float | None = None
    seed: int = 0
    quiet: bool = False

    @property
    def server(self) -> str:
        return self.url.rstrip("/").removesuffix("/v1")

    @property
    def work(self) -> Path:
        """Where the answers are kept, beside the file."""
        return self.out.with_name(self.out.name + ".journal")

    def fingerprint(self) -> dict[str, Any]:
        """All that decides what is asked, by the option that says it. What only judges answers, or
        says how many, may be changed and the answers used again."""
        found = {
            "URL": self.server,
            "--model": self.model,
            "--style": self.style,
            "--seeds": _digest(self.seeds),
            "--held-out": self.held_out and [_digest(self.held_out), self.overlap],
            "--completions": self.completions,
            "--max-tokens": self.max_tokens,
            "--stop": list(self.stop),
            "--temperature": self.temperature,
            "--logprobs": self.logprobs,
            "--seed": self.seed,
        }
        if self.style == ICL:
            found |= {"--demonstrations": self.demonstrations, "--select": self.select}
        if self.style == COT:
            found |= {"--ask": self.ask, "--mark": self.mark}
        return found


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
