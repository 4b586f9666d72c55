"""The compressed matrices of a checkpoint, read before any worker starts.

A directory, or a hub id whose files are in the cache, is checked in full: headers against config.
For a hub id that vLLM has yet to download only the names are read; each worker checks what it loads
all the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from compress_methods.compressed import INDEX, MAIN_TENSOR, SINGLE, open_compressed, read_json
from compress_methods.errors import CheckpointError
from compress_methods.quantization_config import CompressionSpec
from vllm_compress.config import Target, local_directory


def find_targets(spec: CompressionSpec, model: str, revision: str | None) -> dict[str, Target]:
    """Every compressed matrix by Hugging Face module name."""
    directory = local_directory(model, revision)
    if directory is not None and (Path(model).is_dir() or _complete(directory)):
        matrices = open_compressed(directory).matrices.values()
        targets = {m.module: Target(m.module, (m.rows, m.cols), m.format) for m in matrices}
    else:
        targets = _from_names(spec, _remote_names(model, revision))
    if not targets:
        raise CheckpointError(f"{model}: no tensor is named *.{MAIN_TENSOR}; nothing is compressed")
    return targets


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
