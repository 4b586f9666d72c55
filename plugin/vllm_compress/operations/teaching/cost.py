"""What answers cost: tokens in and out, and money where prices are known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

MILLION = 1e6


@dataclass
class Bill:
    """Adds up answers; prices are of a million tokens. `unknown` answers came without counts."""

    price_in: float | None = None
    price_out: float | None = None
    answers: int = 0
    unknown: int = 0
    tokens_in: int = 0
    tokens_out: int = 0

    def add(self, tokens_in: int | None, tokens_out: int | None) -> None:
        """Count one answer."""
        self.answers += 1
        self.unknown += tokens_in is None or tokens_out is None
        self.tokens_in += tokens_in or 0
        self.tokens_out += tokens_out or 0

    @property
    def money(self) -> float | None:
        """None where a price is missing."""
        if self.price_in is None or self.price_out is None:
            return None
        return (self.tokens_in * self.price_in + self.tokens_out * self.price_out) / MILLION

    def note(self) -> str:
        """The bill in a few words."""
        least = "at least " if self.unknown else ""
        money = "" if self.money is None else f", cost {self.money:.4f}"
        return f"{least}{self.tokens_in:,} tokens in, {self.tokens_out:,} out{money}"

    def to_dict(self) -> dict[str, Any]:
        return {
            "answers": self.answers,
            "tokens_in": self.tokens_in,
            "tokens_out": self.tokens_out,
            "answers_without_counts": self.unknown,
            "cost": self.money,
        }
