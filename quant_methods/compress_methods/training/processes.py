"""Several processes that train one student, each on its share of every batch.

    torchrun --nproc-per-node 2 -m vllm_compress.cli recover DIR --teacher MODEL -o OUT

Each has the whole student; gradients are averaged (DistributedDataParallel, over gloo on CPUs, NCCL
on GPUs), so a step is that of one process with the whole batch. The first one owns the output
directory: it writes text, checkpoints and the result, and the others read what it has written, so
all have to see the same files.

Fails where: the student does not fit into the memory of each. Answers of different lengths count a
little more in shares with fewer of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from compress_methods.conversion.driver import Running
from compress_methods.errors import RecipeError
from compress_methods.recipe.training import Training


@dataclass(frozen=True)
class Processes:
    """`count` of them, of which this is number `rank`; `state` is accelerate's, None for one."""

    count: int = 1
    rank: int = 0
    state: Any = None

    @property
    def leads(self) -> bool:
        return self.rank == 0

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """The first process does it, then the others, which find what it has left."""
        if self.state is None:
            yield
            return
        with self.state.main_process_first():
            yield

    def wait(self) -> None:
        """Until all are here."""
        if self.state is not None:
            self.state.wait_for_everyone()

    def agree(self, value: bool) -> bool:
        """What the first process says."""
        if self.state is None:
            return value
        said = [value]
        torch.distributed.broadcast_object_list(said, src=0)
        return bool(said[0])


def count_of() -> int:
    """How many processes were started together, as torchrun and accelerate tell."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def join(settings: Training, running: Running) -> tuple[Processes, Running]:
    """Meet the other processes; what this one computes on, and only the first tells of progress.
    `RecipeError` where they cannot share a batch."""
    count = count_of()
    if count == 1:
        return Processes(), running
    if settings.batch % count:
        raise RecipeError(f"batch is {settings.batch}, expected a multiple of {count} processes")
    from accelerate import PartialState  # an extra, and only for several processes

    on_cpu = running.device.type == "cpu"
    state = PartialState(cpu=on_cpu)
    device = running.device if on_cpu else state.device
    quiet = running.quiet or not is_first()
    return Processes(count, state.process_index, state), replace(
        running, device=device, quiet=quiet
    )
