"""Running one stage: its units in order, the activations moved along, and at the end the held-out
text through what came out and through the original.

At most one block of weights is in memory. Everything that is finished is in the journal, so a run
that was killed goes on where it was.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from compress_methods.conversion.blocks import BlockRunner, batch_size
from compress_methods.conversion.checkpoint import Source
from compress_methods.conversion.journal import Journal
from compress_methods.conversion.plan import EMBEDDINGS, Plan, Unit
from compress_methods.conversion.units import (
    CALIBRATION,
    HELD_BASE,
    HELD_COMPRESSED,
    Converter,
    compare_held_out,
    embedding_rows,
    read_matrix,
)
from compress_methods.memory import return_large_blocks
from compress_methods.progress import Progress
from compress_methods.skeleton import Skeleton


@dataclass(frozen=True)
class Opened:
    """A model and a recipe that fit each other."""

    skeleton: Skeleton
    source: Source
    plan: Plan


class Run:
    """The state of one stage. Without `tokens` [samples + held_out, length] nothing is run.

    `base` are the original's held-out states after its last block [held_out, length, hidden], where
    the source of this stage is not the original; otherwise they are there afterwards.
    """

    def __init__(
        self,
        job: Opened,
        tokens: Tensor | None,
        base: Tensor | None = None,
        *,
        label: str = "converting",
        quiet: bool = False,
    ) -> None:
        self.job = job
        self.tokens = tokens
        self.base = base
        self.label = label
        self.quiet = quiet
        self.held_out: dict[str, Any] | None = None

    def execute(self, journal: Journal) -> None:
        """Convert every unit that is not finished, then compare with the original."""
        self.journal = journal
        units = self.job.plan.units
        finished = self.journal.finished
        sizes = {unit.name: self._size(unit) for unit in units}
        done = sum(size for name, size in sizes.items() if name in finished)
        with Progress(sum(sizes.values()), self.label, done=done, quiet=self.quiet) as progress:
            converter = self.converter(progress)
            for unit in units:
                if unit.name not in finished:
                    self._start_runner(converter, unit)
                    began = time.monotonic()
                    facts = converter.convert(unit)
                    facts["seconds"] = time.monotonic() - began
                    self.journal.record(unit.name, unit.file, facts)
                    self.journal.drop_states(unit.block or 0)
            if self.tokens is not None:
                self._start_runner(converter, None)
                self._compare(converter)

    def converter(self, progress: Progress) -> Converter:
        """What turns units into files."""
        return Converter(self.job.skeleton, self.job.source, self.journal, progress)

    def held_names(self) -> tuple[str, ...]:
        """The states that move through the blocks, besides those the stage is calibrated on."""
        return (HELD_COMPRESSED,) if self.base is not None else (HELD_BASE, HELD_COMPRESSED)

    def state_names(self) -> tuple[str, ...]:
        return (CALIBRATION, *self.held_names())

    def _size(self, unit: Unit) -> int:
        source = self.job.source
        matrices = sum(source.entry(f"{job.target.module}.weight").nbytes for job in unit.jobs)
        return matrices + sum(source.entries[name].nbytes for name in unit.copies)

    def _start_runner(self, converter: Converter, unit: Unit | None) -> None:
        """Before the first unit that needs it: materialize what surrounds the blocks, embed."""
        if self.tokens is None or converter.runner is not None:
            return
        if unit is not None and unit.block is None:
            return
        runner = self.block_runner()
        index = sum(u.block is not None and u.block >= 0 for u in self.job.plan.units)
        if unit is not None and unit.block is not None and unit.block >= 0:
            index = unit.block
        converter.states = self.states(converter, runner, index, self.state_names())
        converter.runner = runner

    def block_runner(self) -> BlockRunner:
        """A runner with everything but blocks, embedding and head in memory."""
        return_large_blocks()
        skeleton, settings = self.job.skeleton, self.job.plan.recipe.calibration
        runner = BlockRunner(skeleton, batch_size(settings.samples, settings.held_out))
        tables = {f"{skeleton.embedding}.weight", f"{skeleton.head}.weight"}
        for name in skeleton.parameter_names():
            if skeleton.block_of(name) is None and name not in tables:
                runner.load({name: self.job.source.read(name)})
        return runner

    def states(
        self, converter: Converter, runner: BlockRunner, index: int, names: tuple[str, ...]
    ) -> dict[str, Tensor]:
        """The activations at the input of block `index`, as saved, else embedded."""
        assert self.tokens is not None
        unit = next(u for u in self.job.plan.units if u.name == EMBEDDINGS)
        rows, samples = self.tokens.unique(), self.job.plan.recipe.calibration.samples
        tables = embedding_rows(converter, unit, rows)
        saved = self.journal.load_states(index)
        if saved is not None:
            runner.embed(self.tokens[: runner.batch], tables["base"], rows)
            return saved
        calibration, held = self.tokens[:samples], self.tokens[samples:]
        which = {
            CALIBRATION: (calibration, "compressed"),
            HELD_BASE: (held, "base"),
            HELD_COMPRESSED: (held, "compressed"),
        }
        found = {}
        for name in names:
            tokens, table = which[name]
            found[name] = runner.embed(tokens, tables[table], rows)
        return found

    def _compare(self, converter: Converter) -> None:
        """Perplexity and KL on the held-out sequences, without ever holding the whole model."""
        skeleton, plan = self.job.skeleton, self.job.plan
        assert converter.runner is not None
        assert converter.states is not None
        assert self.tokens is not None
        states = converter.states
        if self.base is None:
            self.base = states[HELD_BASE]
        if not plan.recipe.calibration.held_out:
            return
        owner = skeleton.tied.get(skeleton.head, skeleton.head)
        job = next((j for j in plan.jobs if j.target.module == owner), None)
        base = self.job.source.read(f"{owner}.weight").float()
        compressed = base
        if job is not None:
            unit = next(u for u in plan.units if job in u.jobs)
            compressed = read_matrix(self.journal.directory / unit.file, job).unpack()
        held = self.tokens[plan.recipe.calibration.samples :]
        weights = {"base": base, "compressed": compressed}
        fmt = None if job is None else job.format
        pair = {HELD_BASE: self.base, HELD_COMPRESSED: states[HELD_COMPRESSED]}
        sums = compare_held_out(converter.runner, pair, held, weights, fmt)
        self.held_out = sums.result().to_dict()
