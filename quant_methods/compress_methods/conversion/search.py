"""prune_to: how far can this model be pruned within a bound?

Levels lie evenly between pruning nothing and everything; those that change nothing or cannot be
carried out fall away, and the exact bytes of the others are known from headers. A bound on size
leaves the levels that meet it, of which the largest model is taken; a bound on perplexity is then
searched by halving: try the level in the middle, go on above it where the bound holds, below it
where not. Every level is converted from the original, so no error is carried from step to step.

    .work/level-2500/   the conversion at 25%, itself journaled; only the best so far stays

A level tried is journaled, so a search that was killed goes on inside the level it was at. At the
end the best moves into OUT, with the curve in report.json and `curve.png`.

Fails where perplexity does not grow with the level: the result is within the bound, but a further
level may be so too.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compress_methods.compressed import read_json
from compress_methods.conversion.chain import Chain, PruneTo
from compress_methods.conversion.curve import draw_curve
from compress_methods.conversion.journal import REPORT, WORK, Journal
from compress_methods.conversion.pipeline import (
    TOKENS,
    Text,
    carry_out,
    check_calibration,
    job_fingerprint,
    sample_tokens,
)
from compress_methods.conversion.preflight import require_room, stages_disk
from compress_methods.conversion.stages import Stage, open_stages
from compress_methods.errors import CompressError, FormatError, OutputError, RecipeError
from compress_methods.files import write_text
from compress_methods.progress import size_text

CURVE = "curve.png"
Opening = tuple[str | Path, bool, int]
"""The model, whether pickles are allowed, and the tensor-parallel size."""


@dataclass(frozen=True)
class Level:
    """One way to prune: `level` of everything that is searched; exact bytes of the result."""

    level: float
    chain: Chain
    bytes: int

    @property
    def name(self) -> str:
        return f"level-{round(1e4 * self.level):04d}"


@dataclass(frozen=True)
class Point:
    """A level that was tried; `increase` is perplexity / base_perplexity - 1."""

    level: float
    bytes: int
    perplexity: float
    base_perplexity: float
    kl: float

    @property
    def increase(self) -> float:
        return self.perplexity / self.base_perplexity - 1

    def within(self, target: PruneTo) -> bool:
        bound = target.perplexity_increase
        return bound is None or self.increase <= bound


def find_levels(chain: Chain, opening: Opening) -> list[Level]:
    """The levels that differ, least pruned first; raises what the last one raised if none can be
    carried out."""
    assert chain.prune_to is not None
    model, allow_pickle, ways = opening
    levels: dict[int, Level] = {}
    problem: CompressError = RecipeError(f"recipe {chain.name!r}: no level prunes anything")
    for step in range(1, chain.prune_to.steps):
        try:
            at = chain.at(step / chain.prune_to.steps)
            stages = open_stages(model, at, allow_pickle, ways)
        except (RecipeError, FormatError) as found:
            problem = found
            continue
        size = stages[-1].opened.plan.compressed_bytes
        levels.setdefault(size, Level(step / chain.prune_to.steps, at, size))
    if not levels:
        raise problem
    return sorted(levels.values(), key=lambda found: -found.bytes)


class Search:
    """One search, in `out`."""

    def __init__(
        self,
        chain: Chain,
        out: Path,
        calibration: str | Path | None,
        opening: Opening,
        *,
        quiet: bool,
    ) -> None:
        assert chain.prune_to is not None
        self.chain, self.target = chain, chain.prune_to
        self.out, self.opening, self.quiet = out, opening, quiet
        self.levels = find_levels(chain, opening)
        self.stages = self._open(self.levels[0])
        source = self.stages[0].opened.source
        self.original_bytes = source.nbytes
        self.text = check_calibration(source.directory, chain.calibration, calibration)
        self.points: list[Point] = []

    def _open(self, level: Level) -> list[Stage]:
        model, allow_pickle, ways = self.opening
        return open_stages(model, level.chain, allow_pickle, ways)

    def run(self) -> dict[str, Any]:
        """Search, or go on searching; returns the report of the result."""
        levels = self._small_enough()
        self._say(
            f"searching {len(levels)} levels from {size_text(levels[0].bytes)} down to "
            f"{size_text(levels[-1].bytes)}; the original has {size_text(self.original_bytes)}"
        )
        # The best result so far lies beside the one that is being made.
        beside = levels[0].bytes if len(levels) > 1 else 0
        require_room(stages_disk([s.opened for s in self.stages], True) + beside, self.out)
        try:
            journal = Journal(self.out, job_fingerprint(self.chain, self.stages, self.text))
        except OSError as problem:
            raise OutputError(f"{self.out}: {problem.strerror or problem}") from problem
        with closing(journal):
            if journal.complete:
                return read_json(self.out / REPORT)
            try:
                best = self._halve(journal, levels)
                return self._keep(journal, best)
            except OSError as problem:
                raise OutputError(
                    f"{self.out}: {problem.strerror or problem}; what is finished is kept, "
                    "the same command continues from there"
                ) from problem
            except OutputError:
                raise
            except CompressError:
                journal.abandon()
                raise

    def _small_enough(self) -> list[Level]:
        """The levels within the bound on size; without one on perplexity only the first of them."""
        size = self.target.size
        if size is None:
            return self.levels
        small = [level for level in self.levels if level.bytes <= size * self.original_bytes]
        if not small:
            least = self.levels[-1]
            raise RecipeError(
                f"recipe {self.chain.name!r}: prune_to.size {100 * size:g}% cannot be met; "
                f"the furthest level, {least.level:.0%}, leaves {self._share(least):.1%} "
                "of the bytes"
            )
        return small if self.target.perplexity_increase is not None else small[:1]

    def _halve(self, journal: Journal, levels: list[Level]) -> Level:
        """The furthest level within the bound on perplexity; `RecipeError` where none is."""
        if self.text.tokens is None:
            tokens = sample_tokens(self.stages, journal.work / TOKENS, quiet=self.quiet)
            self.text = Text(None, tokens)
        best, beyond = -1, len(levels)
        while beyond - best > 1:
            middle = (best + beyond) // 2
            point = self._try(journal, levels[middle])
            within = point.within(self.target)
            worse = levels[best] if within and best >= 0 else None if within else levels[middle]
            if worse is not None:
                shutil.rmtree(journal.work / worse.name, ignore_errors=True)
            best, beyond = (middle, beyond) if within else (best, middle)
        if best >= 0:
            return levels[best]
        journal.discard()
        closest = min(self.points, key=lambda point: point.increase)
        raise RecipeError(
            f"recipe {self.chain.name!r}: prune_to.perplexity_increase "
            f"{100 * (self.target.perplexity_increase or 0):g}% cannot be met; the best, at level "
            f"{closest.level:.0%} and {self._share(closest):.1%} of the bytes, is "
            f"{closest.increase:+.1%} ({closest.perplexity:.3f}, was {closest.base_perplexity:.3f})"
        )

    def _try(self, journal: Journal, level: Level) -> Point:
        """Convert at a level and measure, unless the journal knows what came out."""
        if level.name not in journal.finished:
            place = journal.work / level.name
            report = carry_out(level.chain, self._open(level), place, self.text, quiet=self.quiet)
            held = report["held_out"]
            values = {key: held[key] for key in ("perplexity", "base_perplexity", "kl")}
            point = {"level": level.level, "bytes": level.bytes, **values}
            journal.record(level.name, f"{WORK}/{level.name}/{REPORT}", {"point": point})
        values = journal.finished[level.name]["point"]
        # A perplexity or KL too large for a float is null in the report.
        point = {key: math.inf if value is None else value for key, value in values.items()}
        found = Point(**point)
        self.points.append(found)
        self._say(
            f"level {found.level:.0%}: {self._share(found):.1%} of the bytes, "
            f"perplexity {found.perplexity:.3f} ({found.increase:+.1%})"
        )
        return found

    def _keep(self, journal: Journal, best: Level) -> dict[str, Any]:
        """Move the best level's files into `out`, the report last, with the curve."""
        place = journal.work / best.name
        if (place / REPORT).exists():
            points = [
                {**asdict(p), "increase": p.increase, "within": p.within(self.target)}
                for p in sorted(self.points, key=lambda point: point.level)
            ]
            report = {
                **read_json(place / REPORT),
                "fingerprint": journal.fingerprint,
                "search": {"target": asdict(self.target), "level": best.level, "points": points},
            }
            write_text(place / REPORT, json.dumps(report, indent=2) + "\n")
            draw_curve(self.out / CURVE, points, self.target, best.level, self.original_bytes)
            for path in sorted(place.iterdir(), key=lambda path: path.name == REPORT):
                path.replace(self.out / path.name)
        report = read_json(self.out / REPORT)
        journal.finish()
        return report

    def _share(self, result: Level | Point) -> float:
        """Bytes as a share of the original's."""
        return result.bytes / self.original_bytes

    def _say(self, line: str) -> None:
        if not self.quiet:
            print(line, file=sys.stderr, flush=True)
