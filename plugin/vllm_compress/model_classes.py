"""What vLLM's class for a model does to compressed matrices: takes no embedding or output head,
moves rows, or has never been compared with transformers; and which class of ours takes its place.

A model class that builds `VocabParallelEmbedding` or `ParallelLMHead` without `quant_config` would
meet tensors it has no parameter for. Read from the source of the class, its bases and the classes
these name: importing model code in the parent could initialise the GPU there. Where the source
cannot be read or shows no such call the answer is yes, and the loader has the last word.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from importlib.util import find_spec, resolve_name
from logging import getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_compress.config import CompressConfig
    from vllm_compress.targets import Target

logger = getLogger("vllm.vllm_compress")

EMBEDDING = "VocabParallelEmbedding"
HEAD = "ParallelLMHead"
PACKAGE = "vllm.model_executor.models"
OURS = {"NomicBertModel": "CompressedNomicBertModel", "GteModel": "CompressedGteModel"}
"""Architectures whose compressed checkpoints a class of `encoders.py` loads."""
WITH_RELU = {"BertForSequenceClassification": "CompressedDistilBertForSequenceClassification"}
"""The same where config.json names that activation of the pooler."""


def register_classes() -> None:
    """Make vLLM know our classes, by names that no checkpoint has; loads none of them."""
    from vllm.model_executor.models import ModelRegistry

    for name in (*OURS.values(), *WITH_RELU.values()):
        ModelRegistry.register_model(name, f"vllm_compress.encoders:{name}")


def choose_classes(hf_config: Any) -> None:
    """Have vLLM build ours for a compressed checkpoint. What it asks of an architecture before it
    has asked of the vLLM class by the name in config.json."""
    from compress_methods.model.relayout import ACTIVATION

    ours = WITH_RELU if getattr(hf_config, ACTIVATION, None) == "relu" else OURS
    names = getattr(hf_config, "architectures", None) or []
    hf_config.architectures = [ours.get(name, name) for name in names]


def check_vocabulary(architectures: list[str], config: CompressConfig) -> None:
    """Raise `CheckpointError` where a compressed embedding or head cannot be served."""
    from compress_methods.errors import CheckpointError

    location = _locate(architectures)
    if location is None:
        return
    spec = config.spec
    modules = {name: t.module for name, t in config.targets.items()}
    heads = [name for name in modules if name.rpartition(".")[2] == "lm_head"]
    wanted = [(EMBEDDING, spec.embedding)] if spec.embedding in modules else []
    wanted += [(HEAD, name) for name in heads]
    for layer, module in wanted:
        if not takes_quant_config(*location, layer):
            tied = f" (tied to {spec.tied[module]})" if module in spec.tied else ""
            raise CheckpointError(
                f"{module}{tied} is compressed, but vLLM's {location[1]} cannot take it so; "
                f"convert again with {spec.embedding or 'the embedding'} and the output head "
                "kept as they are"
            )


def check_rows(targets: Mapping[str, Target], hf_config: Any) -> dict[str, Target]:
    """Targets that know how vLLM moves their rows; `CheckpointError` where a format can't follow.

    A matrix that vLLM's class builds without a quantization method is refused too.
    """
    from compress_methods.checkpoint.row_order import check_order, how_moved
    from compress_methods.errors import CheckpointError, FormatError
    from compress_methods.model.architecture import architecture_of

    text = hf_config.get_text_config()
    unquantized = architecture_of(text).unquantized
    found = {}
    for name, target in targets.items():
        if target.module.rpartition(".")[2] in unquantized:
            raise CheckpointError(
                f"{target.module} is compressed, but vLLM's class for {text.model_type} cannot "
                "take it so; convert again with a rule that keeps it as it is"
            )
        try:
            check_order(target.module, target.shape, target.format, text)
        except FormatError as problem:
            raise CheckpointError(str(problem)) from None
        found[name] = replace(target, moved=how_moved(target.module, text))
    return found


def warn_unproven(hf_config: Any) -> None:
    """Say, once, that a kind of model has not been compared with transformers."""
    from compress_methods.model.architecture import architecture_of

    text = hf_config.get_text_config()
    if not any(architecture_of(config).proven for config in (hf_config, text)):
        logger.warning(
            "serving of compressed %s models is unproven: no test compares vLLM's class for them "
            "with transformers; measure with `vllm-compress eval` before you rely on it",
            text.model_type,
        )


def is_draft(architectures: list[str]) -> bool:
    """Whether a model is a draft for speculative decoding, which has only some of the matrices."""
    from vllm.model_executor.models import registry

    drafts = getattr(registry, "_SPECULATIVE_DECODING_MODELS", {})
    return any(name in drafts for name in architectures)


def _locate(architectures: list[str]) -> tuple[str, str] | None:
    """(module, class) of the first architecture that vLLM has a class of its own for."""
    from vllm.model_executor.models import ModelRegistry

    for name in architectures:
        entry = ModelRegistry.models.get(name)
        module, cls = getattr(entry, "module_name", None), getattr(entry, "class_name", None)
        if isinstance(module, str) and isinstance(cls, str):
            return module, cls
    return None


@lru_cache
def takes_quant_config(module: str, cls: str, layer: str) -> bool:
    """Whether every `layer(...)` that a model class leads to is given a quant_config."""
    calls: list[ast.Call] = []
    _walk(module, cls, layer, calls, set())
    return all(
        any(keyword.arg in ("quant_config", None) for keyword in call.keywords) for call in calls
    )


def _walk(
    module: str, cls: str, layer: str, calls: list[ast.Call], seen: set[tuple[str, str]]
) -> None:
    if (module, cls) in seen:
        return
    seen.add((module, cls))
    classes, imports = _parse(module)
    if cls in imports:
        _walk(*imports[cls], layer, calls, seen)
    if cls not in classes:
        return
    for node in ast.walk(classes[cls]):
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == layer:
            calls.append(node)
        elif isinstance(node, ast.Name) and (node.id in classes or node.id in imports):
            _walk(module, node.id, layer, calls, seen)


@lru_cache
def _parse(module: str) -> tuple[dict[str, ast.ClassDef], dict[str, tuple[str, str]]]:
    """Classes of a module, and what it imports from other modules of vLLM's models."""
    try:
        spec = find_spec(module)
        assert spec is not None
        assert spec.origin is not None
        tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    except (AssertionError, ImportError, OSError, SyntaxError, ValueError):
        return {}, {}
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    imports: dict[str, tuple[str, str]] = {}
    for node in tree.body:
        if not isinstance(node, ast.ImportFrom):
            continue
        dots = "." * node.level
        source = (
            resolve_name(dots + (node.module or ""), spec.parent or "") if dots else node.module
        )
        if source is not None and source.startswith(PACKAGE):
            imports |= {a.asname or a.name: (source, a.name) for a in node.names}
    return classes, imports
