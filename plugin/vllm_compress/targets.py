"""The compressed matrices of a checkpoint, read before any worker starts.

A directory, or a hub id whose files are in the cache, is checked in full: headers against config.
For a hub id that vLLM has yet to download only the names are read; each worker checks what it loads
all the same.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from compress_methods.checkpoint.compressed import INDEX, SINGLE, open_compressed, read_json
from compress_methods.checkpoint.loading.model import require_whole
from compress_methods.checkpoint.quantization_config import CompressionSpec
from compress_methods.errors import CheckpointError
from compress_methods.formats import MAIN_TENSOR, Format


@dataclass(frozen=True)
class Target:
    """A compressed matrix: its Hugging Face module name, [rows, cols] and format. `shared`: it is
    the matrix of another module, which `module` names. `moved`: how vLLM's class moves its rows
    while it loads them, as `Architecture.moved_rows` says."""

    module: str
    shape: tuple[int, int]
    format: Format
    shared: bool = False
    moved: str | None = None


def find_targets(spec: CompressionSpec, model: str, revision: str | None) -> dict[str, Target]:
    """Every compressed matrix by Hugging Face module name."""
    directory = local_directory(model, revision)
    if directory is not None and (Path(model).is_dir() or _complete(directory)):
        matrices = open_compressed(directory).matrices.values()
        _require_whole(directory)
        targets = {m.module: Target(m.module, (m.rows, m.cols), m.format) for m in matrices}
    else:
        targets = _from_names(spec, _remote_names(model, revision))
    if not targets:
        raise CheckpointError(f"{model}: no tensor is named *.{MAIN_TENSOR}; nothing is compressed")
    return targets


def _require_whole(directory: Path) -> None:
    """Refuse a checkpoint that lacks tensors: vLLM counts them only for models not quantized."""
    try:
        require_whole(directory)
    except AssertionError:
        # Where this process has served a model through vLLM's Transformers backend, vLLM has put
        # code of its own into transformers' classes, which then build nothing outside an engine.
        check = "import pathlib, sys; from compress_methods.checkpoint.loading import model as l; "
        check += "l.require_whole(pathlib.Path(sys.argv[1]))"
        found = subprocess.run(
            [sys.executable, "-c", check, str(directory)], capture_output=True, text=True
        )
        if found.returncode:
            last = found.stderr.strip().rpartition("\n")[2]
            raise CheckpointError(last.partition(": ")[2] or last) from None


def _complete(directory: Path) -> bool:
    """Whether a cached snapshot has all its weights, not only the files vLLM reads first."""
    if not (directory / INDEX).exists():
        return (directory / SINGLE).exists()
    shards = set(read_json(directory / INDEX).get("weight_map", {}).values())
    return all((directory / shard).exists() for shard in shards)


def _remote_names(model: str, revision: str | None) -> Iterable[str]:
    from vllm.transformers_utils.config import get_safetensors_params_metadata

    try:
        return get_safetensors_params_metadata(model, revision=revision)
    except Exception as problem:
        raise CheckpointError(
            f"{model}: cannot read the names of its tensors ({problem})"
        ) from None


def _from_names(spec: CompressionSpec, names: Iterable[str]) -> dict[str, Target]:
    targets = {}
    for name in names:
        module, _, tensor = name.rpartition(".")
        if tensor != MAIN_TENSOR:
            continue
        rule = spec.rule_for(module)
        if rule is None or rule.shape is None:
            raise CheckpointError(f"{name}: quantization_config has no rule with a shape for it")
        targets[module] = Target(module, rule.shape, spec.formats[rule.format])
    return targets


def local_directory(model: str, revision: str | None) -> Path | None:
    """Where a model's files are on this machine; None for a hub id that is not in the cache."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError, OSError):
        return None
