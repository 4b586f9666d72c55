"""Whether models fit in main memory, and in which dtype, before they are loaded.

Sizes come from file headers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch

from compress_methods.checkpoint.compressed import open_compressed, read_entries, read_json
from compress_methods.checkpoint.quantization_config import QUANT_METHOD
from compress_methods.errors import CalibrationError, CheckpointError
from compress_methods.formats import torch_dtype
from compress_methods.system.memory import available_bytes
from compress_methods.system.words import size_text


def parameters(directory: Path) -> Counter[torch.dtype]:
    """How many values of each dtype a checkpoint has once loaded; raises `CheckpointError`.

    A compressed matrix counts as bfloat16, which it is unpacked to at the least.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory")
    block = read_json(directory / "config.json").get("quantization_config") or {}
    counts: Counter[torch.dtype] = Counter()
    if block.get("quant_method") == QUANT_METHOD:
        checkpoint = open_compressed(directory)
        entries = checkpoint.dense
        counts[torch.bfloat16] += sum(m.rows * m.cols for m in checkpoint.held.values())
    else:
        entries = read_entries(directory)
    for entry in entries.values():
        counts[torch_dtype(entry.dtype)] += math.prod(entry.shape)
    return counts


def loading_dtype(directories: Iterable[Path], advice: str) -> torch.dtype:
    """float32 where the models fit twice over in it, else the first one's own dtype.

    Raises `CalibrationError`, ending in `advice`, where they do not fit at all.
    """
    paths = list(directories)
    counts = [parameters(path) for path in paths]
    values = sum(count.total() for count in counts)
    own = _own_dtype(counts[0])
    free = available_bytes()
    if 2 * 4 * values <= free:
        return torch.float32
    if own.itemsize * values > 0.9 * free:
        names = " and ".join(path.name for path in paths)
        raise CalibrationError(
            f"{names}: {size_text(own.itemsize * values)} of weights do not fit "
            f"{size_text(free)} of free memory; {advice}"
        )
    return own


def _own_dtype(count: Counter[torch.dtype]) -> torch.dtype:
    """The float dtype of two bytes or more that most values have; bfloat16 where none has."""
    usual = [d for d, _ in count.most_common() if d.is_floating_point and d.itemsize > 1]
    return usual[0] if usual else torch.bfloat16
