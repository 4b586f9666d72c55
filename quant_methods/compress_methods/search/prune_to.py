"""prune_to: how far can this model be pruned within a bound?

Levels lie evenly between pruning nothing and everything; those that change nothing or cannot be
carried out fall away, and the exact bytes of the others are known from headers. A bound on size
leaves the levels that meet it, of which the largest model is taken; a bound on perplexity is then
searched by halving: try the level in the middle, go on above it where the bound holds, below it
where not. Every level is converted from the original, so no error is carried from step to step.

    .work/level-2500/   the conversion at 25%, itself journaled; only the best so far stays

The bound is judged on every other held-out sequence, the result is reported on the rest: the level
that looked best on a text looks better there than it is. So the report may exceed the bound; both
numbers are in it. Without a bound on perplexity nothing is chosen by text, and all of it reports.

A packing with a `budget` of KL is searched alike: its levels are sizes between all matrices in
their largest formats and all in their smallest, and what the survey of blocks found serves them
all.

A level tried is journaled, so a search that was killed goes on inside the level it was at. At the
end the best moves into OUT, with the curve in report.json and `curve.png`.

Fails where perplexity does not grow with the level: the result is within the bound, but a further
level may be so too.
"""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from compress_methods.conversion.driver import SURVEY
from compress_methods.conversion.job import (
    TOKENS,
    carry_out,
    check_calibration,
    job_fingerprint,
    sample_tokens,
)
from compress_methods.conversion.journal import REPORT, WORK, Journal
from compress_methods.conversion.planning.calibration import settings_of
from compress_methods.conversion.recovery import verified
from compress_methods.conversion.resources import require_room, stages_disk
from compress_methods.conversion.running import Running
from compress_methods.conversion.stages import Stage, open_stages
from compress_methods.errors import CompressError, FormatError, RecipeError
from compress_methods.recipe.stages import PruneTo, StagedRecipe
from compress_methods.search.curve import draw_curve
from compress_methods.search.publish import opened, publish
from compress_methods.system.words import size_text

CURVE = "curve.png"
Opening = tuple[str | Path, bool, int]
"""The model, whether pickles are allowed, and the tensor-parallel size."""


@dataclass(frozen=True)
class Level:
    """One way to prune: `level` of everything that is searched; exact bytes of the result."""

    level: float
    recipe: StagedRecipe
    bytes: int

    @property
    def name(self) -> str:
        return f"level-{round(1e4 * self.level):04d}"


@dataclass(frozen=True)
class Point:
    """A level that was tried, as measured on the half that chooses; `increase` is
    perplexity / base_perplexity - 1."""

    level: float
    bytes: int
    perplexity: float
    base_perplexity: float
    kl: float

    @property
    def increase(self) -> float:
        return self.perplexity / self.base_perplexity - 1

    def within(self, target: PruneTo) -> bool:
        bounds = ((self.increase, target.perplexity_increase), (self.kl, target.kl))
        return all(bound is None or found <= bound for found, bound in bounds)

    def beyond(self, target: PruneTo) -> str:
        """The bound that a level does not meet, and what it has instead."""
        rise, most = target.perplexity_increase, target.kl
        if rise is not None and not self.increase <= rise:
            return (
                f"prune_to.perplexity_increase {100 * rise:g}% cannot be met; the best, at LEVEL, "
                f"is {self.increase:+.1%} ({self.perplexity:.3f}, was {self.base_perplexity:.3f})"
            )
        return f"a KL of {most:g} cannot be met; the best, at LEVEL, is {self.kl:.5f}"


def find_levels(recipe: StagedRecipe, opening: Opening) -> list[Level]:
    """The levels that differ, least pruned first; raises what the last one raised if none can be
    carried out."""
    if recipe.prune_to is None:
        return list(_find_budgets(recipe, opening))
    model, allow_pickle, ways = opening
    levels: dict[int, Level] = {}
    problem: CompressError = RecipeError(f"recipe {recipe.name!r}: no level prunes anything")
    for step in range(1, recipe.prune_to.steps):
        try:
            at = recipe.at(step / recipe.prune_to.steps)
            stages = open_stages(model, at, allow_pickle, ways)
        except (RecipeError, FormatError) as found:
            problem = found
            continue
        size = stages[-1].planned.plan.compressed_bytes
        levels.setdefault(size, Level(step / recipe.prune_to.steps, at, size))
    if not levels:
        raise problem
    return sorted(levels.values(), key=lambda found: -found.bytes)


def _find_budgets(recipe: StagedRecipe, opening: Opening) -> Iterator[Level]:
    """Levels of a packing whose budget is a KL: the most bytes each may come to."""
    assert recipe.search is not None
    model, allow_pickle, ways = opening
    plan = open_stages(model, recipe, allow_pickle, ways)[-1].planned.plan
    steps = recipe.search.steps
    for step in range(steps + 1):
        size = plan.compressed_bytes - plan.allowance.reserved * step // steps
        yield Level(step / steps, recipe.within(size), size)


class Search:
    """One search, in `out`."""

    def __init__(
        self,
        recipe: StagedRecipe,
        out: Path,
        calibration: str | Path | Sequence[str | Path] | None,
        opening: Opening,
        running: Running,
    ) -> None:
        assert recipe.search is not None
        self.recipe, self.target = recipe, recipe.search
        self.out, self.opening, self.running = out, opening, running
        self.levels = find_levels(recipe, opening)
        self.stages = self._open(self.levels[0])
        settings = settings_of(self.stages)  # all levels see the same text
        self.levels = [
            replace(level, recipe=level.recipe.calibrated(settings)) for level in self.levels
        ]
        source = self.stages[0].planned.source
        self.original_bytes = source.nbytes
        self.text = check_calibration(source.directory, settings, calibration)
        self.points: list[Point] = []

    def _open(self, level: Level) -> list[Stage]:
        model, allow_pickle, ways = self.opening
        return open_stages(model, level.recipe, allow_pickle, ways)

    def run(self) -> dict[str, Any]:
        """Search, or go on searching; returns the report of the result."""
        levels = self._small_enough()
        self._say(
            f"searching {len(levels)} levels from {size_text(levels[0].bytes)} down to "
            f"{size_text(levels[-1].bytes)}; the original has {size_text(self.original_bytes)}"
        )
        # The best result so far lies beside the one that is being made.
        beside = levels[0].bytes if len(levels) > 1 else 0
        require_room(stages_disk([s.planned for s in self.stages], True) + beside, self.out)
        fingerprint = job_fingerprint(self.recipe, self.stages, self.text, self.running)
        with opened(self.out, fingerprint) as journal:
            if journal.complete:
                source = self.stages[0].planned.source.directory
                found = verified(journal, source, None, self.running.quiet)
                if found is not None:
                    return found
            best = self._halve(journal, levels)
            return publish(journal, best.name, "search", self._told(best))

    def _small_enough(self) -> list[Level]:
        """The levels within the bound on size; where text decides nothing, the first of them."""
        size = self.target.size
        if size is None:
            return self.levels
        small = [level for level in self.levels if level.bytes <= size * self.original_bytes]
        if not small:
            least = self.levels[-1]
            raise RecipeError(
                f"recipe {self.recipe.name!r}: prune_to.size {100 * size:g}% cannot be met; "
                f"the furthest level, {least.level:.0%}, leaves {self._share(least):.1%} "
                "of the bytes"
            )
        return small if self.target.by_text else small[:1]

    def _halve(self, journal: Journal, levels: list[Level]) -> Level:
        """The furthest level within the bounds on text; `RecipeError` where none is."""
        if self.text.tokens is None:
            kept = journal.work / TOKENS
            tokens = sample_tokens(self.stages, kept, self.running, self.text.preset)
            self.text = replace(self.text, tokens=tokens)
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
        by_kl = self.target.kl is not None
        closest = min(self.points, key=lambda p: p.kl if by_kl else p.increase)
        at = f"level {closest.level:.0%} and {self._share(closest):.1%} of the bytes"
        why = closest.beyond(self.target).replace("LEVEL", at)
        raise RecipeError(f"recipe {self.recipe.name!r}: {why}")

    def _try(self, journal: Journal, level: Level) -> Point:
        """Convert at a level and measure, unless the journal knows what came out."""
        if level.name not in journal.finished:
            place = journal.work / level.name
            running = self.running
            if self.recipe.prune_to is None:
                running = replace(running, survey=journal.work / SURVEY)
            report = carry_out(level.recipe, self._open(level), place, self.text, running)
            held = report["held_out_halves"][0] if self.target.by_text else report["held_out"]
            values = {key: held[key] for key in ("perplexity", "base_perplexity", "kl")}
            point = {"level": level.level, "bytes": report["bytes_after"], **values}
            journal.record(level.name, f"{WORK}/{level.name}/{REPORT}", {"point": point})
        values = journal.finished[level.name]["point"]
        # A perplexity or KL too large for a float is null in the report.
        point = {key: math.inf if value is None else value for key, value in values.items()}
        found = Point(**point)
        self.points.append(found)
        self._say(
            f"level {found.level:.0%}: {self._share(found):.1%} of the bytes, "
            f"perplexity {found.perplexity:.3f} ({found.increase:+.1%}), KL {found.kl:.5f}"
        )
        return found

    def _told(self, best: Level) -> Callable[[dict[str, Any], Path], dict[str, Any]]:
        """What adds the search to the report of its result, and draws the curve beside it."""

        def tell(report: dict[str, Any], place: Path) -> dict[str, Any]:
            points = [
                {**asdict(p), "increase": p.increase, "within": p.within(self.target)}
                for p in sorted(self.points, key=lambda point: point.level)
            ]
            draw_curve(place / CURVE, points, self.target, best.level, self.original_bytes)
            found = {"target": asdict(self.target), "level": best.level, "points": points}
            if self.target.by_text:
                found["chosen_on"], report["held_out"] = report.pop("held_out_halves")
            return {**report, "search": found}

        return tell

    def _share(self, result: Level | Point) -> float:
        """Bytes as a share of the original's."""
        return result.bytes / self.original_bytes

    def _say(self, line: str) -> None:
        if not self.running.quiet:
            print(line, file=sys.stderr, flush=True)
