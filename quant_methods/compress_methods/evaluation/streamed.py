"""What a checkpoint predicts, compressed or not, with the weights of one block in memory.

Rows of tokens are padded on the right to one of a few lengths: in a causal model nothing that
follows a token changes what is predicted there. The rows of all lengths go through a block while
it is loaded. Their states wait in main memory, `PORTION_BYTES` of them at a time; more rows
take the weights from disk once more.

Fails where: the model is not causal, or gives its blocks something of the tokens (Gemma-3n).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from compress_methods.checkpoint.loading.model import is_compressed, quantize_activations
from compress_methods.checkpoint.loading.tied import open_skeleton
from compress_methods.checkpoint.source import open_source
from compress_methods.errors import CheckpointError
from compress_methods.model.block_runner import BlockRunner
from compress_methods.model.device import MOST_SEQUENCES, batch_size, exact_products
from compress_methods.model.skeleton import Skeleton
from compress_methods.model.task import NEXT_TOKEN
from compress_methods.system.portions import portions
from compress_methods.system.progress import Progress

PORTION_BYTES = 2**30
SHORTEST = 16
FLOAT = 4


@dataclass
class _Group:
    """Rows of one length: their indices, and the runner that moves their states."""

    indices: list[int]
    runner: BlockRunner
    states: Tensor


class StreamedModel:
    """A checkpoint directory whose blocks are read when their turn comes; `CheckpointError`."""

    def __init__(
        self,
        directory: Path,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        allow_pickle: bool = False,
    ) -> None:
        exact_products()
        self.skeleton = open_skeleton(directory, allow_pickle)
        if self.skeleton.architecture.loss != NEXT_TOKEN:
            raise CheckpointError(f"{directory}: not a causal language model, has no next token")
        if is_compressed(directory):
            quantize_activations(self.skeleton, directory)
        self.source = open_source(directory, self.skeleton, directory.name, allow_pickle)
        self.device, self.dtype = device, dtype

    def logits(
        self, rows: Sequence[Sequence[int]], progress: Progress | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """(index, float32 logits [len(row), vocabulary]) of every row, in any order. `progress`
        counts tokens times blocks; its total is set here."""
        blocks = len(self.skeleton.blocks)
        if progress is not None:
            progress.total = sum(map(len, rows)) * blocks
        for portion in self._portions(rows):
            groups = self._embed(rows, portion)
            tokens = sum(len(rows[i]) for i in portion)
            for index in range(blocks):
                self._load_block(groups[0].runner, index)
                for group in groups:
                    group.runner.run(index, group.states)
                groups[0].runner.unload(f"{self.skeleton.blocks_name}.{index}")
                if progress is not None:
                    progress.step(tokens, f"layer {index}")
            self._load(groups[0].runner, after_blocks(self.skeleton))
            for group in groups:
                for at, i in enumerate(group.indices):
                    yield i, group.runner.logits(group.states[at : at + 1])[0, : len(rows[i])]

    def _portions(self, rows: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """Indices of rows whose states fit together, short ones first."""
        width = self.skeleton.module(self.skeleton.embedding).weight.shape[1]
        short_first = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        return portions(short_first, lambda i: _padded(len(rows[i])) * width * FLOAT, PORTION_BYTES)

    def _embed(self, rows: Sequence[Sequence[int]], portion: list[int]) -> list[_Group]:
        """The rows by length, as they go into the first block."""
        lengths: dict[int, list[int]] = defaultdict(list)
        for i in portion:
            lengths[_padded(len(rows[i]))].append(i)
        used = torch.tensor(sorted({token for i in portion for token in rows[i]}))
        name = self.skeleton.slots[self.skeleton.embedding].parameter
        table = table_rows(self.source.slabs(name), used)
        before = {
            alias: owner
            for alias, owner in after_blocks(self.skeleton).items()
            if not alias.startswith(f"{self.skeleton.head}.")
        }
        groups: list[_Group] = []
        longest = max(len(row) for row in rows)
        for length, indices in lengths.items():
            tokens = _matrix([rows[i] for i in indices], min(length, longest))
            sequence = 12 * tokens.shape[1] * table.shape[1] * self.dtype.itemsize
            batch = batch_size(self.device, sequence, len(tokens))
            runner = BlockRunner(self.skeleton, batch, self.device, self.dtype)
            if not groups:
                self._load(runner, before)
            groups.append(_Group(indices, runner, runner.embed(tokens, table, used)))
        return groups

    def _load(self, runner: BlockRunner, names: dict[str, str]) -> None:
        runner.load({alias: self.source.read(owner) for alias, owner in names.items()})

    def _load_block(self, runner: BlockRunner, index: int) -> None:
        prefix = f"{self.skeleton.blocks_name}.{index}."
        names = [n for n in self.skeleton.parameter_names() if n.startswith(prefix)]
        for name in names:
            self._load(runner, {name: name})


def _padded(length: int) -> int:
    """The next power of two, so that there are few lengths and none wastes more than half."""
    return max(SHORTEST, 1 << (length - 1).bit_length())


def _matrix(rows: Sequence[Sequence[int]], length: int) -> Tensor:
    """Rows padded with their last token, and as many as go through in equal batches."""
    count = len(rows)
    if count > MOST_SEQUENCES:
        count = -(-count // MOST_SEQUENCES) * MOST_SEQUENCES
    padded = [[*row, *[row[-1]] * (length - len(row))] for row in rows]
    return torch.tensor(padded + [padded[-1]] * (count - len(rows)))


def after_blocks(skeleton: Skeleton) -> dict[str, str]:
    """Parameters outside the blocks but the token table, the head's among them, and the parameter
    that each is stored as."""
    head = skeleton.tied.get(skeleton.head, skeleton.head)
    names = {f"{skeleton.head}.weight": f"{head}.weight"} if skeleton.head else {}
    return names | {
        name: name
        for name in skeleton.parameter_names()
        if skeleton.block_of(name) is None and name != f"{skeleton.embedding}.weight"
    }


def table_rows(slabs: Iterable[tuple[int, Tensor]], rows: Tensor) -> Tensor:
    """Sorted rows of a matrix that comes in pieces, float32."""
    pieces = []
    for first, slab in slabs:
        mine = rows[(rows >= first) & (rows < first + len(slab))]
        pieces.append(slab[mine - first].float())
    return torch.cat(pieces)
