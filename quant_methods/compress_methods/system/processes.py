"""Several processes that do one job together, as torchrun starts them.

    torchrun --nproc-per-node 2 -m vllm_compress.cli convert MODEL --recipe R -o OUT

Tensors on CPUs go by gloo, those on GPUs by NCCL; every process has a GPU of its own. The first one
(rank 0) owns the output directory and speaks for all; the others read what it has written, so all
have to see the same files. None can go on without the others: when one fails all end, and the one
that failed first says why.
"""

from __future__ import annotations

import atexit
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from compress_methods.errors import CompressError
from compress_methods.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
MEET = timedelta(minutes=10)
WORK = timedelta(days=14)
"""How long one process may wait for another: it is told when one has ended, and a model may need
hours to write its calibration text."""
PARTING = 0.3
CHUNK = 2**28
FAILED = "vllm_compress/failed"
CONTINUES = "what is finished is kept, the same command continues from there"


@dataclass(frozen=True)
class Processes:
    """`count` of them, of which this is number `rank`. All have to call the same methods in the
    same order. Each raises `CompressError` where another process has ended."""

    count: int = 1
    rank: int = 0

    @property
    def leads(self) -> bool:
        return self.rank == 0

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """The first process does it, then the others, which find what it has left."""
        if not self.leads:
            self.wait()
        yield
        if self.leads:
            self.wait()

    @contextmanager
    def one_by_one(self) -> Iterator[None]:
        """One process after the other does it."""
        for _ in range(self.rank):
            self.wait()
        yield
        for _ in range(self.rank, self.count):
            self.wait()

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            with _meeting():
                torch.distributed.barrier()

    def first(self, call: Callable[[], T]) -> T:
        """What the call gives in the first process, which alone makes it."""
        if self.count == 1:
            return call()
        said: list[Any] = [call() if self.leads else None]
        with _meeting():
            torch.distributed.broadcast_object_list(said, src=0)
        found: T = said[0]
        return found

    def agree(self, value: T) -> T:
        """What the first process says."""
        return self.first(lambda: value)

    def gathered(self, value: T) -> list[T]:
        """What each process says, by rank."""
        if self.count == 1:
            return [value]
        said: list[Any] = [None] * self.count
        with _meeting():
            torch.distributed.all_gather_object(said, value)
        return said

    def add(self, tensor: Tensor) -> None:
        """Put the sum over all processes in a tensor's place: the same bits in each."""
        if self.count > 1:
            with _meeting():
                torch.distributed.all_reduce(tensor)

    def spread(self, tensor: Tensor, rank: int) -> None:
        """Put what process `rank` has in a contiguous tensor's place."""
        if self.count > 1:
            with _meeting():
                torch.distributed.broadcast(_bytes(tensor), src=rank)

    def collected(
        self, tensors: Mapping[str, Tensor]
    ) -> Iterator[tuple[int, Mapping[str, Tensor]]]:
        """In the first process (rank, tensors on the CPU) of one process after the other, so that
        no more than one's come to its own; in the others nothing."""
        shapes = self.gathered({n: (t.shape, t.dtype) for n, t in tensors.items()})
        if self.leads:
            yield 0, tensors
        for rank in range(1, self.count):
            if self.leads:
                found = {n: torch.empty(s, dtype=dtype) for n, (s, dtype) in shapes[rank].items()}
                for piece in _pieces(found):
                    with _meeting():
                        torch.distributed.recv(piece, rank)
                yield rank, found
            elif self.rank == rank:
                for piece in _pieces({n: t.contiguous() for n, t in tensors.items()}):
                    with _meeting():
                        torch.distributed.send(piece, 0)

    def share(self, count: int, unit: int = 1) -> slice:
        """Which of `count` things in a row are this process's, in whole units of `unit`."""
        units = count // unit
        first, last = (units * rank // self.count * unit for rank in (self.rank, self.rank + 1))
        return slice(first, last)


def _bytes(tensor: Tensor) -> Tensor:
    """The same memory; no backend has to know the dtype."""
    return tensor.view(-1).view(torch.uint8)


def _pieces(tensors: Mapping[str, Tensor]) -> Iterator[Tensor]:
    for tensor in tensors.values():
        yield from _bytes(tensor).split(CHUNK) if tensor.numel() else ()


@contextmanager
def _meeting() -> Iterator[None]:
    try:
        yield
    except RuntimeError as problem:  # of torch.distributed, where a connection is gone
        raise CompressError(f"another process of this job has ended; {CONTINUES}") from problem


def count_of() -> int:
    """How many processes were started together, as torchrun and accelerate tell."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def count_here() -> int:
    """How many of them share this machine's memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", count_of()))


def is_first() -> bool:
    """Whether this process speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def join(device: torch.device) -> tuple[Processes, torch.device]:
    """Meet the other processes, and the device that this one computes on: of GPUs that of its
    LOCAL_RANK. `CompressError` where there is none for it, or no meeting."""
    count = count_of()
    if count == 1:
        return Processes(), device
    try:
        rank = int(os.environ["RANK"])
        local = int(os.environ.get("LOCAL_RANK", rank))
        if device.type == "cuda":
            there = torch.cuda.device_count()
            if local >= there:
                raise CompressError(
                    f"process {local + 1} of this machine has no GPU of its own: there are {there}"
                )
            device = torch.device("cuda", local)
            torch.cuda.set_device(device)
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group(
                BACKENDS[device.type], store=_store(), rank=rank, world_size=count, timeout=WORK
            )
            atexit.register(_leave)
    except (KeyError, RuntimeError, ValueError) as problem:
        raise CompressError(
            f"WORLD_SIZE is {count}, but the processes do not meet ({problem}); start them with "
            "torchrun, or unset it"
        ) from problem
    return Processes(count, rank), device


def _leave() -> None:
    """Threads of gloo's let go of the last tensors a moment after those were sent, and need the
    interpreter for it: one that is about to end would abort the process."""
    torch.distributed.destroy_process_group()
    time.sleep(PARTING)


@cache
def _store() -> Any:
    """Where the processes meet; torchrun's own, which outlives each of them."""
    from torch.distributed.rendezvous import rendezvous

    return next(rendezvous("env://", timeout=MEET))[0]


@contextmanager
def one_voice() -> Iterator[None]:
    """Where processes of one command fail, only the first that does says why; the others exit with
    the same code. The signal by which torchrun ends those that are left is an error, too, so that
    the output directory is left as by any other. For a program of ours, not for a library call."""
    if count_of() == 1:
        yield
        return
    before = signal.signal(signal.SIGTERM, _end)
    try:
        yield
    except CompressError as problem:
        if _has_the_word():
            raise
        raise SystemExit(problem.exit_code) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _end(*_: Any) -> None:
    raise CompressError(f"ended by a signal; {CONTINUES}")


def _has_the_word() -> bool:
    try:
        return int(_store().add(FAILED, 1)) == 1
    except (RuntimeError, ValueError):
        return is_first()
