"""split_adapter: a result in format `lowrank` as its base and a LoRA adapter.

    vllm-compress split-adapter out -o apart
    vllm serve apart/base --enable-lora --max-lora-rank 32 --lora-modules whole=apart/adapter

The base is `out` without factors. The adapter has them as PEFT stores LoRA (`lora_A` is B [rank,
inputs], `lora_B` A [outputs, rank]; alpha equals the rank, so their product is added as it is), in
bfloat16: request model `whole`, and vLLM's own LoRA kernels compute what `out` would. An adapter
belongs to that very base: another conversion rounds otherwise.

Fails where a matrix in `lowrank` has no base, and where the factors' layers take no LoRA in vLLM
(the embedding and the head of most models).
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress_methods.checkpoint.companions import copy_companions
from compress_methods.checkpoint.compressed import (
    INDEX,
    CompressedCheckpoint,
    open_compressed,
    read_entries,
)
from compress_methods.checkpoint.safetensors import Entry, Writer, read_header, write_tensors
from compress_methods.conversion.report import index_text
from compress_methods.errors import CheckpointError
from compress_methods.formats import Format, TensorSpec
from compress_methods.formats.wrappers.lowrank import LowRank
from compress_methods.lazy import torch
from compress_methods.system.files import new_directory, write_text

if TYPE_CHECKING:
    from torch import Tensor

BASE, ADAPTER = "base", "adapter"
PREFIX = "base_model.model."
"""What PEFT puts before the name of every module."""


def split_adapter(directory: str | Path, out: str | Path) -> dict[str, int]:
    """Write `out`/base and `out`/adapter of a compressed `directory`; returns the rank by module.

    Raises `CheckpointError` where there is nothing to split off, `OutputError` where `out` exists.
    """
    found, place = open_compressed(directory), Path(out)
    ranks = {name: rank for name, m in found.held.items() if (rank := _rank(name, m.format))}
    if not ranks:
        raise CheckpointError(f"{found.path}: no matrix is in format 'lowrank'")
    with new_directory(place) as unfinished:
        base, adapter = unfinished / BASE, unfinished / ADAPTER
        for part in (base, adapter):
            part.mkdir()
        _write_base(found, base)
        write_tensors(adapter / "adapter_model.safetensors", _factors(found, ranks))
        _write_json(adapter / "adapter_config.json", _settings(ranks, str(place / BASE)))
    return ranks


def _rank(module: str, fmt: Format) -> int:
    """That of a matrix that has factors beside a base, else 0."""
    if not isinstance(fmt, LowRank):
        return 0
    if fmt.base is None:
        raise CheckpointError(f"{module}: is {fmt.describe()} alone, without a base to add it to")
    return fmt.rank


def _factors(found: CompressedCheckpoint, ranks: dict[str, int]) -> dict[str, Tensor]:
    """The adapter's tensors."""
    out = {}
    for module in ranks:
        stored, fmt = found.held[module].stored(), found.held[module].format
        assert isinstance(fmt, LowRank)
        for name, factor in (("lora_A", fmt.right(stored)), ("lora_B", fmt.left(stored))):
            out[f"{PREFIX}{module}.{name}.weight"] = factor.values().to(torch.bfloat16)
    return out


def _settings(ranks: dict[str, int], base: str) -> dict[str, Any]:
    """What PEFT and vLLM read of an adapter. Ranks that differ go by a module's whole name."""
    most = max(ranks.values())
    others = {module: rank for module, rank in ranks.items() if rank != most}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": most,
        "lora_alpha": most,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": sorted({module.rpartition(".")[2] for module in ranks}),
        "rank_pattern": others,
        "alpha_pattern": others,
    }


def _write_base(found: CompressedCheckpoint, out: Path) -> None:
    """The checkpoint in the formats' bases, file by file."""
    names = {
        entry.name
        for matrix in found.matrices.values()
        for name, entry in matrix.entries.items()
        if not isinstance(matrix.format, LowRank)
        or matrix.format.base is None
        or name in matrix.format.base.tensors(matrix.rows, matrix.cols)
    }
    files: dict[str, dict[str, Entry]] = defaultdict(dict)
    for name, entry in read_entries(found.path).items():
        if name in names or name in found.dense:
            files[entry.path.name][name] = entry
    for file, entries in files.items():
        specs = {name: TensorSpec(entry.shape, entry.dtype) for name, entry in entries.items()}
        with Writer(out / file, specs) as writer:
            for name, entry in entries.items():
                for _, slab in entry.slabs():
                    writer.put(name, slab)
    copy_companions(found.path, out)
    if (found.path / INDEX).exists():
        write_text(out / INDEX, index_text({file: read_header(out / file) for file in files}))
    formats = {
        name: fmt.base if isinstance(fmt, LowRank) and fmt.base is not None else fmt
        for name, fmt in found.spec.formats.items()
    }
    block = replace(found.spec, formats=formats).to_dict()
    _write_json(out / "config.json", {**found.config, "quantization_config": block})
    open_compressed(out)


def _write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")
