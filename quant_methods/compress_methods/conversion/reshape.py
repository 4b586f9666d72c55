"""Carrying out a transform: score the blocks if it wants that, choose the layers, then write what
stays, block after block, edited, under its new name.

Two passes where blocks are scored, for which layers stay is known only after the last one; else
one. Streaming, journaled and resumable as the packing is, with the packing's own machinery.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress_methods.algorithms.base import Hessian
from compress_methods.conversion.blocks import BlockRunner
from compress_methods.conversion.journal import Journal
from compress_methods.conversion.outline import Outline, outline, transform_plan
from compress_methods.conversion.plan import Unit
from compress_methods.conversion.run import Opened, Run
from compress_methods.conversion.units import CALIBRATION, HELD_BASE, Converter, Facts
from compress_methods.errors import RecipeError
from compress_methods.formats import TensorSpec
from compress_methods.progress import Progress
from compress_methods.safetensors_io import Writer, read_tensors, write_tensors
from compress_methods.transforms import Block, Transform

SCORES, SCAN = "scores", "scan.safetensors"


@dataclass
class Reshaper(Converter):
    """Writes the layers `kept`, as `made` says, after `transform` has edited them."""

    transform: Transform = None  # type: ignore[assignment]
    made: Outline = None  # type: ignore[assignment]
    kept: Sequence[int] = ()

    def _block(self, unit: Unit, index: int) -> Facts:
        assert self.runner is not None
        assert self.states is not None
        runner, states, old = self.runner, self.states, self.kept[index]
        prefix = f"{self.skeleton.blocks_name}.{old}"
        runner.load(self.parameters(prefix))
        if HELD_BASE in states:
            runner.run(old, states[HELD_BASE])
        edited: dict[str, Tensor] = {}
        if self.transform.edits_blocks:
            edited = self.transform.edit(self._opened(old))
        self._write_block(unit, edited)
        for name in states:
            if name != HELD_BASE:
                runner.run(old, states[name])
        runner.unload(prefix)
        self.journal.save_states(index + 1, states)
        return {"modules": {}}

    def _opened(self, old: int) -> Block:
        def hessian(name: str) -> Hessian:
            assert self.runner is not None
            assert self.states is not None
            module = f"{self.skeleton.blocks_name}.{old}.{name}"
            gathered = self.runner.gather(old, self.states[CALIBRATION], {module: "hessian"})[0][1]
            assert isinstance(gathered, Hessian)
            return gathered

        return Block(self.skeleton.blocks[old], self.skeleton.model.config, hessian)

    def _write_block(self, unit: Unit, edited: dict[str, Tensor]) -> None:
        """The unit's file: edited tensors in the dtype they had, all others as they are."""
        names = {old: self.made.moves[old] or "" for old in unit.copies}
        headers = self.made.source.entries
        specs = {new: TensorSpec(headers[new].shape, headers[new].dtype) for new in names.values()}
        with Writer(self.journal.directory / unit.file, specs) as writer:
            for old, new in names.items():
                tail = next((tail for tail in edited if old.endswith(f".{tail}")), None)
                if tail is None:
                    self._put(old, writer, new)
                    continue
                value = edited[tail].to(specs[new].dtype)
                if value.shape != specs[new].shape:
                    raise RecipeError(
                        f"{self.transform.name}: made {new} {list(value.shape)}, "
                        f"expected {list(specs[new].shape)} from its own config"
                    )
                writer.put(new, value)
                self.progress.step(self.source.entries[old].nbytes, new)


class Reshape(Run):
    """One transform carried out; `config` is the source's config.json.

    Afterwards `made` is the result, and `kept` and `scores` say which layers stayed and why.
    """

    def __init__(
        self, transform: Transform, config: dict[str, Any], *run: Any, **more: Any
    ) -> None:
        super().__init__(*run, **more)
        self.transform = transform
        self.config = config
        self.scores: list[float] = []
        self.kept: list[int] = []

    def execute(self, journal: Journal) -> None:
        self.journal = journal
        skeleton, source, transform = self.job.skeleton, self.job.source, self.transform
        if transform.scores_blocks:
            self.scores = self._scan()
        self.kept = transform.choose(self.scores or [0.0] * len(skeleton.blocks))
        self.made = outline(transform, skeleton, source, self.config, self.kept)
        calibration = self.job.plan.recipe.calibration
        plan = transform_plan(transform, calibration, skeleton, source, self.made, self.scores)
        self.job = Opened(skeleton, source, plan)
        super().execute(journal)

    def converter(self, progress: Progress) -> Converter:
        job = self.job
        return Reshaper(
            *(job.skeleton, job.source, self.journal, progress),
            transform=self.transform,
            made=self.made,
            kept=self.kept,
        )

    def state_names(self) -> tuple[str, ...]:
        calibration = (CALIBRATION,) if self.transform.edits_blocks else ()
        return (*calibration, *self.held_names())

    def _scan(self) -> list[float]:
        """Score every block on the calibration text; the original's last states on the way."""
        path = self.journal.work / SCAN
        if not path.exists():
            write_tensors(path, self._score_blocks())
            self.journal.drop_states(len(self.job.skeleton.blocks) + 1)
        found = read_tensors(path)
        self.base = found.get(HELD_BASE, self.base)
        scores: list[float] = found[SCORES].tolist()
        return scores

    def _score_blocks(self) -> dict[str, Tensor]:
        skeleton, source = self.job.skeleton, self.job.source
        count = len(skeleton.blocks)
        first = self.journal.saved_index() or 0
        names = (CALIBRATION,) if self.base is not None else (CALIBRATION, HELD_BASE)
        label = self.label + ", scoring blocks"
        with Progress(count, label, done=first, quiet=self.quiet) as progress:
            runner = self.block_runner()
            converter = Converter(skeleton, source, self.journal, progress)
            states = self.states(converter, runner, first, names)
            scores = states.setdefault(SCORES, torch.zeros(count, dtype=torch.float64))
            for index in range(first, count):
                scores[index] = self._score(converter, runner, index, states)
                self.journal.save_states(index + 1, states)
                self.journal.drop_states(index + 1)
                progress.step(1, f"layer {index}")
        return {name: states[name] for name in (SCORES, HELD_BASE) if name in states}

    def _score(
        self, converter: Converter, runner: BlockRunner, index: int, states: dict[str, Tensor]
    ) -> float:
        """Score block `index` and move the states through it."""
        prefix = f"{self.job.skeleton.blocks_name}.{index}"
        runner.load(converter.parameters(prefix))
        total = 0.0
        for piece in states[CALIBRATION].split(runner.batch):
            before = piece.clone()
            runner.run(index, piece)
            total += self.transform.score(before, piece) * len(piece)
        if HELD_BASE in states:
            runner.run(index, states[HELD_BASE])
        runner.unload(prefix)
        return total / len(states[CALIBRATION])
