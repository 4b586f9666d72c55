"""repacking: matrices that the source stores quantized, stored as the same numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from compress_methods.checkpoint.interchange import DecodedEntry
from compress_methods.checkpoint.interchange.parts.recast import recast
from compress_methods.conversion.part import Facts, StreamedPart
from compress_methods.conversion.planning.plan import Job
from compress_methods.errors import RecipeError
from compress_methods.formats import Stored
from compress_methods.kernels.reference import Reference


def repack(part: StreamedPart, job: Job) -> Facts:
    """Store a matrix as its source does, in the job's format; returns what the report says of its
    values. `RecipeError` where that format does not hold the same numbers."""
    source, slot = part.planned.source, job.slot
    entry = source.entries[source.tensor_of(slot)]
    if not isinstance(entry, DecodedEntry):
        raise RecipeError(f"{slot.module}: repack takes what is quantized, the source has floats")
    if slot.parameter in part.edited:
        raise RecipeError(f"{slot.module}: repack takes it as it is, but a transform changed it")
    fmt, solution = entry.stored()
    values = fmt.matrix(solution)
    found = recast(fmt, solution, job.format)
    tensors = None if found is None else job.format.pack(found)
    if tensors is None or not _same(
        values, Stored.whole(job.format, tensors, (slot.rows, slot.cols))
    ):
        raise RecipeError(
            f"{slot.module}: {job.format.describe()} does not hold what the source stores "
            f"({fmt.describe()})"
        )
    zero = values == 0
    facts: Facts = {
        "format": job.format.describe(),
        "algorithm": job.algorithm.name,
        "shape": [slot.rows, slot.cols],
        "bytes_before": source.nbytes_of(slot),
        "bytes_after": sum(tensor.nbytes for tensor in tensors.values()),
        "weight_error": 0.0,
        "output_error": None,
        "zeros": int(zero.sum()) / (slot.rows * slot.cols),
        "zero_rows": int(zero.all(1).sum()),
    }
    part.store(job, tensors, facts)
    return facts


def _same(values: Tensor, stored: Stored) -> bool:
    """Whether a stored matrix has those values, unpacked a few rows at a time."""
    first = 0
    for rows in Reference().slabs(stored):
        if not torch.equal(rows, values[first : first + len(rows)]):
            return False
        first += len(rows)
    return first == len(values)
