"""Where tensors are computed: `auto`, `cpu` or `cuda[:i]`.

Weights stream through the device block by block; states wait in main memory, pinned where a GPU
takes them from there. Solves are in float32 with TF32 off. Bits are reproducible for the same
kind of device and number of threads, so both are part of a conversion's fingerprint (`signature`).
"""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor

from compress_methods.errors import CompressError

AUTO = "auto"
MOST_SEQUENCES = 8
SHARE = 0.25
"""Of a GPU's free memory that the activations of one batch may take."""


def resolve_device(name: str | torch.device = AUTO) -> torch.device:
    """The device of a name; `auto` is the first GPU, if there is one. Raises `CompressError`."""
    if isinstance(name, torch.device):
        return name
    if name == AUTO:
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise CompressError(f"--device is {name!r}, expected auto, cpu, cuda or cuda:N")
    if kind == "cuda":
        count = torch.cuda.device_count()
        if int(index or 0) >= count:
            raise CompressError(f"--device is {name!r}, but this machine has {count} GPUs")
        return torch.device("cuda", int(index or 0))
    return torch.device("cpu")


def exact_products() -> None:
    """Multiply float32 as float32 on GPUs too: a Hessian in TF32 loses half its digits."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def signature(device: torch.device) -> str:
    """What the bits of a result depend on besides the inputs: kind of device, number of threads."""
    if device.type == "cuda":
        return f"{device.type} {torch.cuda.get_device_name(device)}"
    return f"{device.type}, {torch.get_num_threads()} threads"


def peak_device_bytes(device: torch.device) -> int | None:
    """Most memory of the device in use at once; None for the CPU: it is the process's."""
    if device.type != "cuda":
        return None
    return torch.cuda.max_memory_allocated(device)


def pinned(states: Tensor, device: torch.device) -> Tensor:
    """States in main memory that a GPU can fetch while it computes."""
    return states.pin_memory() if device.type == "cuda" else states


def batch_size(device: torch.device, sequence_bytes: int, *counts: int) -> int:
    """Sequences that go through a block together: the largest batch that divides every count.

    On CPUs up to 8; on GPUs as many as a quarter of the free memory holds the activations of,
    `sequence_bytes` each.
    """
    most = MOST_SEQUENCES
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        most = max(1, int(SHARE * free) // max(1, sequence_bytes))
    return _divisor(gcd(*counts), most)


def unit_size(ways: int, *counts: int) -> int:
    """Sequences that stay together where so many processes share them, so that each can run
    batches: at most 8, and of the first count something for each. By the counts alone: what is
    whose stays the same."""
    return _divisor(gcd(*counts), min(MOST_SEQUENCES, max(1, counts[0] // ways)))


def _divisor(number: int, most: int) -> int:
    """The largest divisor up to `most`."""
    return next(b for b in range(min(most, number), 0, -1) if number % b == 0)
