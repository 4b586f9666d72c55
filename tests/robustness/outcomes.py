"""What can come of an input that is not as it should be."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class Outcome(Enum):
    """`VALUE` and `CLEAR` are good ones, the others are faults."""

    VALUE = "still good"
    CLEAR = "clear"
    UNCLEAR = "unclear"
    SILENT = "silent"
    CRASHED = "crashed"


@dataclass
class Tally:
    """Inputs of one kind by what came of them, and the first few of each kind of fault."""

    kind: str
    counts: dict[Outcome, int] = field(default_factory=lambda: dict.fromkeys(Outcome, 0))
    faults: list[str] = field(default_factory=list)

    def add(self, outcome: Outcome, what: str) -> None:
        self.counts[outcome] += 1
        if outcome not in (Outcome.VALUE, Outcome.CLEAR) and len(self.faults) < 5:
            self.faults.append(f"{outcome.value}: {what}")

    @property
    def tried(self) -> int:
        return sum(self.counts.values())


def table(tallies: list[Tally]) -> str:
    """As Markdown, one row a kind."""
    titles = ["Input", "Tried", *(outcome.value.capitalize() for outcome in Outcome)]
    rows = [titles, ["---", *["---:"] * (len(titles) - 1)]]
    for tally in tallies:
        counts = [tally.tried, *(tally.counts[outcome] for outcome in Outcome)]
        rows.append([tally.kind, *(f"{count:,}" for count in counts)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
