"""Held-out text through the original and the result, without ever holding the whole model."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from pathlib import Path

from torch import Tensor

from compress_methods import __version__
from compress_methods.checkpoint.interchange.own import OWN
from compress_methods.checkpoint.loading.model import quantize_inputs
from compress_methods.checkpoint.safetensors import Entry, read_header
from compress_methods.conversion.part import Planned
from compress_methods.conversion.planning.plan import Job, Shard
from compress_methods.evaluation.metrics import Sums
from compress_methods.evaluation.outputs.judge import Judge
from compress_methods.evaluation.streamed import after_blocks, table_rows
from compress_methods.formats import Stored
from compress_methods.kernels import Want, embed, prepare
from compress_methods.model.block_runner import BlockRunner


class Written:
    """What is in the finished files of a result; `edited` are parameters that passes replaced."""

    def __init__(self, folder: Path, planned: Planned, edited: Collection[str] = ()) -> None:
        self.folder, self.planned, self.edited = folder, planned, edited

    def shard_of(self, module: str) -> tuple[Shard, Job] | None:
        """The shard and job that a packed module is stored by."""
        owner = self.planned.plan.tied.get(module, module)
        for shard in self.planned.plan.shards:
            for job in shard.jobs:
                if job.slot.module == owner:
                    return shard, job
        return None

    def packed(self, module: str) -> Stored | None:
        """A packed module, read; None where it is kept."""
        found = self.shard_of(module)
        if found is None:
            return None
        shard, job = found
        entries, slot, layout = (
            read_header(self.folder / shard.file),
            job.slot,
            self.planned.plan.layout,
        )
        if layout is OWN:
            fmt = job.format
            names = fmt.tensors(slot.rows, slot.cols)
            tensors = {name: entries[f"{slot.module}.{name}"].read() for name in names}
        else:
            block = layout.config(self.planned.plan.compression_spec("", __version__))
            fmt, solution = dataclasses.replace(layout, block=block).read(slot.module, entries)
            tensors = fmt.pack(solution)
        return Stored.whole(fmt, tensors, (slot.rows, slot.cols))

    def copied(self, name: str) -> Entry:
        """A parameter that is kept, where the result holds it."""
        plan, tensor = self.planned.plan, self.planned.source.names[name]
        shard = next(shard for shard in plan.shards if tensor in shard.copies)
        entries = read_header(self.folder / shard.file)
        return entries[plan.renamed.get(tensor, tensor)]

    def changed(self, name: str) -> Tensor | None:
        """A parameter outside the blocks in float32; None where it is the original's."""
        packed = self.packed(name.removesuffix(".weight"))
        if packed is not None:
            return packed.values()
        return self.copied(name).read().float() if name in self.edited else None


def embedding_rows(written: Written, rows: Tensor) -> dict[str, Tensor]:
    """Rows `rows` of the token table, original (`base`) and as the result holds them."""
    skeleton, source = written.planned.skeleton, written.planned.source
    name = skeleton.slots[skeleton.embedding].parameter
    base = table_rows(source.slabs(name), rows)
    packed = written.packed(skeleton.embedding)
    if packed is not None:
        return {"base": base, "result": embed(rows, prepare(packed, Want(embed=True)), base.dtype)}
    if name in written.edited:
        return {"base": base, "result": table_rows(written.copied(name).slabs(), rows)}
    return {"base": base, "result": base}


def outside(written: Written) -> dict[str, dict[str, Tensor]]:
    """What follows the blocks, the head among it: the original's tensors (`base`), and those of the
    result that differ."""
    source, names = written.planned.source, after_blocks(written.planned.skeleton)
    base = {alias: source.read(owner).float() for alias, owner in names.items()}
    changed = {alias: written.changed(owner) for alias, owner in names.items()}
    return {"base": base, "result": {n: t for n, t in changed.items() if t is not None}}


def compare_held_out(
    runner: BlockRunner,
    written: Written,
    states: Mapping[str, Tensor],
    tokens: Tensor,
    judge: Judge,
) -> list[Sums | float]:
    """Held-out sequences [n, length] through what follows the blocks, the original's and the
    result's, each on its own; `states` `base` and `result` are those after the last block."""
    skeleton = runner.skeleton
    head = skeleton.module(skeleton.head)
    found = written.shard_of(skeleton.head)
    tensors = outside(written)
    base = {n: t for n, t in tensors["base"].items() if n in tensors["result"]}
    runner.load(tensors["base"])
    sums = []
    for i in range(len(tokens)):
        logits = {}
        for which, changed in (("base", base), ("result", tensors["result"])):
            runner.load(changed)
            with ExitStack() as stack:
                if which == "result" and found is not None:
                    stack.callback(quantize_inputs(head, found[1].format).remove)
                logits[which] = runner.logits(states[which][i : i + 1])[0]
        sums.append(judge.compare(logits["base"], logits["result"], tokens[i]))
    return sums
