"""One sweep over a model: load a part, let the passes visit it, write, journal, advance.

At most one block of weights is in memory. Everything that is finished is in the journal, so a sweep
that was killed goes on where it was. Where text runs through the model, these states move along:

    calibration      what the passes are calibrated on, through the result
    held_compressed  text that no pass sees, through the result
    held_base        the same through the source, where the original's is not known yet
    teacher          the calibration text through the source, where a pass asks for it

A sweep whose passes look ahead first surveys all blocks, unchanged.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from compress_methods.calibration.settings import ALL
from compress_methods.checkpoint.integrity import read_checked, write_checked
from compress_methods.checkpoint.safetensors import Entry, Writer
from compress_methods.checkpoint.source import require_finite
from compress_methods.conversion.held_out import Written, compare_held_out, embedding_rows
from compress_methods.conversion.journal import Journal
from compress_methods.conversion.part import BlockPart, Facts, Planned, StreamedPart
from compress_methods.conversion.passes import carried, kv_cache
from compress_methods.conversion.passes.weighing import asked_of, weigh
from compress_methods.conversion.planning.kv_cache import KV_SHARD
from compress_methods.conversion.planning.plan import HEAD_BLOCK, Shard
from compress_methods.conversion.recovery import forget_damaged
from compress_methods.conversion.running import Running
from compress_methods.errors import RecipeError
from compress_methods.evaluation.outputs.judge import Judge
from compress_methods.formats import TensorSpec, torch_dtype
from compress_methods.model.block_runner import BlockRunner
from compress_methods.model.device import batch_size, exact_products, pinned, unit_size
from compress_methods.system.progress import Progress
from compress_methods.transforms import Pass

CALIBRATION, TEACHER = "calibration", "teacher"
HELD_BASE, HELD_COMPRESSED = "held_base", "held_compressed"
SURVEY = "survey.safetensors"


@dataclass(frozen=True)
class Target:
    """What a sweep makes: the plan's shards, the headers of tensors that are not packed, and which
    layers of the source they come from."""

    planned: Planned
    entries: Mapping[str, Entry]
    layers: Sequence[int]


class Sweep:
    """`passes` visit every part in order. Without `tokens` [samples + held_out, length] no text
    runs through the model.

    `base` are the original's held-out states after its last block [held_out, length, hidden], where
    the source of this sweep is not the original; otherwise they are there afterwards. `retarget`
    gives the target anew once passes that looked ahead have decided.
    """

    def __init__(
        self,
        target: Target,
        passes: Sequence[Pass],
        tokens: Tensor | None,
        base: Tensor | None = None,
        *,
        retarget: Callable[[Target, Sequence[Pass]], Target] | None = None,
        running: Running | None = None,
        label: str = "converting",
    ) -> None:
        self.target, self.passes = target, list(passes)
        self.tokens, self.base = tokens, base
        self.retarget, self.running = retarget, running or Running()
        self.label = label
        self.held_out: dict[str, Any] | None = None
        self.held_out_halves: list[dict[str, Any]] = []
        self.runner: BlockRunner | None = None
        self.states: dict[str, Tensor] = {}

    @property
    def planned(self) -> Planned:
        return self.target.planned

    def execute(self, journal: Journal) -> None:
        """Convert every shard that is not finished, then compare with the original."""
        exact_products()
        self.journal = journal
        self._survey()
        shards, finished = self.planned.plan.shards, journal.finished
        if self.running.processes.leads:
            forget_damaged(journal, shards, self.tokens is not None, self.running.quiet)
        journal.tell()
        self._weigh([shard for shard in shards if shard.name not in finished])
        sizes = {shard.name: self._size(shard) for shard in shards}
        done = sum(size for name, size in sizes.items() if name in finished)
        quiet = self.running.quiet
        with Progress(sum(sizes.values()), self.label, done=done, quiet=quiet) as self.progress:
            for shard in shards:
                if shard.name not in finished:
                    began = time.monotonic()
                    facts = self._convert(shard)
                    facts["seconds"] = time.monotonic() - began
                    journal.record(shard.name, shard.file, facts)
                    journal.drop_states(shard.block or 0)
            if self.tokens is not None:
                self._start(None)
                self._compare()

    def look_ahead(self, journal: Journal) -> None:
        """Nothing but the survey: `passes` have decided afterwards."""
        exact_products()
        self.journal = journal
        self._survey()

    def _convert(self, shard: Shard) -> Facts:
        """Visit and write one shard; returns its facts for journal and report."""
        if shard.name == KV_SHARD:
            return kv_cache.write_scales(self.journal, shard, self.planned.skeleton)
        self._start(shard)
        part = self._open(shard)
        for visitor in self.passes:
            visitor.visit(part)
        if self.running.processes.leads:
            self._write(shard, part)
        with kv_cache.watched(self.planned, self.running.processes) as seen:
            if isinstance(part, BlockPart) and part.index != HEAD_BLOCK:
                self._advance(part)
                self.runner_.unload(part.prefix)
                self.journal.save_states((shard.block or 0) + 1, self.states)
        edited = sorted(part.edited.keys() - {job.slot.parameter for job in shard.jobs})
        told = {"refined": part.refined, "edited": edited, "notes": part.notes, kv_cache.FACT: seen}
        return {"modules": part.modules, **{key: value for key, value in told.items() if value}}

    @property
    def runner_(self) -> BlockRunner:
        assert self.runner is not None
        return self.runner

    def _open(self, shard: Shard) -> StreamedPart:
        """The shard as its passes see it; a block is loaded, and the original's states moved."""
        index = shard.block
        index = index if index is None or index < 0 else self.target.layers[index]
        if self.runner is None or index is None:
            return StreamedPart(*self._streamed(shard, index))
        part = self._block(shard, index)
        self.planned.load(self.runner_, part.prefix)
        if index != HEAD_BLOCK:
            if HELD_BASE in self.states:
                self.runner_.run(index, self.states[HELD_BASE])
            part.teach()
            self._share(part)
        return part

    def _block(self, shard: Shard, index: int) -> BlockPart:
        assert self.runner is not None
        return BlockPart(
            *self._streamed(shard, index),
            runner=self.runner,
            states=self.states,
            calibration=CALIBRATION,
            teacher=TEACHER,
            work=self.journal.work,
        )

    def _streamed(self, shard: Shard, index: int | None) -> tuple[Any, ...]:
        running = self.running
        return self.planned, shard, index, running.device, self.progress, running.processes

    def _share(self, part: BlockPart) -> None:
        """Matrices that are stored as another layer's get that one's values."""
        written = self._written()
        for slot in part.slots:
            if slot.module in self.planned.plan.tied:
                packed = written.packed(slot.module)
                assert packed is not None
                part.weight(slot).copy_(packed.values())

    def _advance(self, part: BlockPart) -> None:
        for name in self.states:
            done = name in (HELD_BASE, TEACHER) or (name == CALIBRATION and part.moved)
            if not done and self.states[name].dim() == 3:
                assert part.index is not None
                self.runner_.run(part.index, self.states[name])

    def _written(self) -> Written:
        edited = {n for line in self.journal.finished.values() for n in line.get("edited", ())}
        return Written(self.journal.directory, self.planned, edited)

    # Writing

    def _write(self, shard: Shard, part: StreamedPart) -> None:
        """The shard's file: packed matrices, then all other tensors, edited or as they are."""
        planned = self.planned
        packed: dict[str, TensorSpec] = {}
        for job in shard.jobs:
            packed |= job.specs(planned.plan.layout)
        names = {old: planned.plan.renamed.get(old, old) for old in shard.copies}
        specs = dict(packed)
        for new in names.values():
            specs[new] = TensorSpec(self.target.entries[new].shape, self.target.entries[new].dtype)
        with Writer(self.journal.directory / shard.file, specs) as writer:
            for name in packed:
                writer.put(name, part.stored.pop(name))
            for old, new in names.items():
                edited = part.changed(old)
                if edited is None:
                    self._copy(old, writer, new)
                    continue
                value = edited.to(torch_dtype(specs[new].dtype)).cpu()
                if tuple(value.shape) != specs[new].shape:
                    who = "+".join(visitor.name for visitor in self.passes)
                    raise RecipeError(
                        f"{who}: made {new} {list(value.shape)}, "
                        f"expected {list(specs[new].shape)} from its own config"
                    )
                writer.put(new, value)
                self.progress.step(planned.source.entries[old].nbytes, new)

    def _copy(self, name: str, writer: Writer, stored: str) -> None:
        """Copy a tensor of the source, a slab at a time, under the name it is `stored` by."""
        entry = self.planned.source.entries[name]
        for _, slab in entry.slabs():
            writer.put(stored, require_finite(entry, slab))
        self.progress.step(entry.nbytes, stored)

    def _size(self, shard: Shard) -> int:
        source = self.planned.source
        copied = sum(source.entries[name].nbytes for name in shard.copies)
        return copied + sum(source.nbytes_of(job.slot) for job in shard.jobs)

    # Text

    def _state_names(self) -> tuple[str, ...]:
        """The states that move through the blocks."""
        visits = any(type(visitor).visit is not Pass.visit for visitor in self.passes)
        teaches = any(visitor.needs_teacher for visitor in self.passes) or (
            visits and self.planned.plan.needs_original
        )
        held = (HELD_BASE, HELD_COMPRESSED)[self.base is not None :]
        return (*(CALIBRATION,) * visits, *(TEACHER,) * teaches, *held)

    def _start(self, shard: Shard | None) -> None:
        """Before the first shard that needs it: materialize what surrounds the blocks, embed."""
        outside = shard is not None and shard.block is None
        if self.tokens is None or self.runner is not None or outside:
            return
        index = sum(u.block is not None and u.block >= 0 for u in self.planned.plan.shards)
        if shard is not None and shard.block is not None and shard.block >= 0:
            index = shard.block
        runner = self._make_runner()
        self.states = self._load_states(runner, index, self._state_names())
        self.runner = runner

    def _make_runner(self) -> BlockRunner:
        """A runner with everything but blocks, embedding and head in memory."""
        skeleton, settings = self.planned.skeleton, self.planned.plan.recipe.calibration
        width = skeleton.module(skeleton.embedding).weight.shape[1]
        device, dtype = self.running.device, self.running.dtype
        # About a dozen tensors of the width of the states are alive inside a block.
        sequence = 12 * settings.length * width * dtype.itemsize
        batch = batch_size(device, sequence, *map(len, self._texts()))
        runner = BlockRunner(skeleton, batch, device, dtype, settings.experts == ALL)
        tables = {f"{skeleton.embedding}.weight", f"{skeleton.head}.weight"}
        for name in skeleton.parameter_names():
            if skeleton.block_of(name) is None and name not in tables:
                runner.load({name: self.planned.source.read(name)})
        return runner

    def _load_states(
        self, runner: BlockRunner, index: int, names: tuple[str, ...]
    ) -> dict[str, Tensor]:
        """The activations at the input of block `index`, as saved, else embedded."""
        assert self.tokens is not None
        rows = self.tokens.unique()
        tables = embedding_rows(self._written(), rows)
        saved = self.journal.load_states(index)
        if saved is not None:
            runner.embed(self.tokens[: runner.batch], tables["base"], rows)
            return {name: pinned(tensor, runner.device) for name, tensor in saved.items()}
        calibration, held = self._texts()
        which = {
            CALIBRATION: (calibration, "result"),
            TEACHER: (calibration, "base"),
            HELD_BASE: (held, "base"),
            HELD_COMPRESSED: (held, "result"),
        }
        found: dict[str, Tensor] = {}
        for name in names:
            tokens, table = which[name][0], tables[which[name][1]]
            # One of several processes may have no text that is held out.
            none = not len(tokens) and CALIBRATION in found
            states = found[CALIBRATION][:0] if none else runner.embed(tokens, table, rows)
            found[name] = pinned(states, runner.device)
        return found

    def _texts(self) -> list[Tensor]:
        """Calibration and held-out tokens that run through the model in this process."""
        settings, processes = self.planned.plan.recipe.calibration, self.running.processes
        assert self.tokens is not None
        unit = unit_size(processes.count, settings.samples, settings.held_out)
        both = self.tokens[: settings.samples], self.tokens[settings.samples :]
        return [tokens[processes.share(len(tokens), unit)] for tokens in both]

    def _compare(self) -> None:
        """Perplexity and KL on the held-out sequences."""
        if self.base is None:
            self.base = self.states[HELD_BASE]
        if self.planned.plan.recipe.calibration.held_out:
            states = {"base": self.base, "result": self.states[HELD_COMPRESSED]}
            planned, written = self.planned, self._written()
            judge = Judge.of(planned.skeleton.architecture, planned.source.directory)
            mine = compare_held_out(self.runner_, written, states, self._texts()[1], judge)
            sums = [one for each in self.running.processes.gathered(mine) for one in each]
            self.held_out = judge.result(sums).to_dict()
            # A search that chooses by one half can only be believed on the other.
            halves = (sums[i::2] for i in (0, 1) if sums[i::2])
            self.held_out_halves = [judge.result(half).to_dict() for half in halves]

    def _weigh(self, shards: Sequence[Shard]) -> None:
        """Let the loss say how much tokens count, where an algorithm asks for it."""
        if self.tokens is None or not any(map(asked_of, shards)):
            return
        tokens = self.tokens[: self.planned.plan.recipe.calibration.samples]
        label, quiet = self.label + ", weighing tokens", self.running.quiet
        work = self.journal.work
        weigh(self.planned, self._make_runner(), tokens, work, shards, label, quiet)

    # Looking ahead

    def _survey(self) -> None:
        """Let the passes that look ahead see every block, and decide."""
        ahead = [visitor for visitor in self.passes if visitor.looks_ahead]
        if not ahead:
            return
        path = self.running.survey or self.journal.work / SURVEY
        found = read_checked(path)
        count = len(self.planned.skeleton.blocks)
        if found is None:
            if any(self.journal.finished.keys() & {u.name for u in self.planned.plan.shards}):
                self.journal.drop_states(count + 1)  # activations of the sweep, not of a survey
            found = self._survey_blocks(ahead)
            write_checked(path, found)
            self.journal.drop_states(count + 1)
        self.base = found.get(HELD_BASE, self.base)
        for number, visitor in enumerate(ahead):
            rows = [found[_row(number, index)].tolist() for index in range(count)]
            self.passes[self.passes.index(visitor)] = visitor.decide(rows)
        if self.retarget is not None:
            self.target = self.retarget(self.target, self.passes)

    def _survey_blocks(self, ahead: Sequence[Pass]) -> dict[str, Tensor]:
        """What each of the passes says of each block, and the source's held-out states."""
        count = len(self.planned.skeleton.blocks)
        first = self.journal.saved_index() or 0
        if self.journal.load_states(first) is None:
            first = 0
        names = (CALIBRATION,) if self.base is not None else (CALIBRATION, HELD_BASE)
        shards = [
            replace(shard, jobs=()) for shard in self.planned.plan.shards if shard.block is None
        ]
        bare = replace(self.planned, plan=replace(self.planned.plan, shards=tuple(shards)))
        target, self.target = self.target, replace(self.target, planned=bare)
        label, quiet = self.label + ", surveying blocks", self.running.quiet
        with Progress(count, label, done=first, quiet=quiet) as self.progress:
            self.runner = self._make_runner()
            self.states = self._load_states(self.runner, first, names)
            for index in range(first, count):
                shard = Shard(f"survey-{index}", index, (), ())
                part = self._block(shard, index)
                self.planned.load(self.runner, part.prefix)
                taken: dict[str, Tensor] = {}
                for number, visitor in enumerate(ahead):
                    row = torch.tensor(visitor.survey(part), dtype=torch.float64)
                    self.states[_row(number, index)] = row
                    taken |= carried.take(part, _row(number, index))
                if HELD_BASE in self.states:
                    self.runner.run(index, self.states[HELD_BASE])
                self._advance(part)
                self.states |= taken  # outputs of this block already
                self.runner.unload(part.prefix)
                self.journal.save_states(index + 1, self.states)
                self.journal.drop_states(index + 1)
                self.progress.step(1, f"layer {index}")
        carried.judge(self.states, self.states[CALIBRATION], self.runner, self._written())
        states, self.states, self.runner, self.target = self.states, {}, None, target
        return {name: t for name, t in states.items() if name != CALIBRATION}


def _row(number: int, index: int) -> str:
    """Where what a pass says of a block is kept."""
    return f"survey-{number}-{index}"
