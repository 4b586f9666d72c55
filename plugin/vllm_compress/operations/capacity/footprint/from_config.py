"""The parameters of a model whose files do not tell them: config.json alone, or what another tool
quantized, whose tensors are packed codes and scales.

transformers builds the model on the meta device. A matrix of a quantized checkpoint takes the bytes
of all tensors below its module, so its values may take parts of a byte each. Fails, in a line, for
models that transformers cannot build and for matrices that the files hold nothing of.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress_methods.errors import CheckpointError
from vllm_compress.operations.capacity.footprint.packed import value_bytes
from vllm_compress.operations.capacity.footprint.tensors import Tensor, itemsize_of

if TYPE_CHECKING:
    from compress_methods.model.skeleton import Skeleton

SERVED = 2
"""Bytes of a value that vLLM serves in 16 bits."""


def built_parameters(path: Path, block: Mapping[str, Any]) -> list[Tensor]:
    """Every parameter by config.json, in 16 bits but for matrices that its `quantization_config`
    `block` says are packed; `CheckpointError`."""
    # Here, because transformers takes longer to import than a plan.
    from compress_methods.model.skeleton import build_skeleton

    skeleton = build_skeleton(path)
    sizes = {}
    for slot in skeleton.slots.values() if block else ():
        sizes[slot.parameter] = value_bytes(block, slot, path) or SERVED
    shapes = skeleton.parameter_names()
    return [Tensor(name, tuple(s), sizes.get(name, SERVED)) for name, s in shapes.items()]


def quantized_parameters(path: Path, headers: Mapping[str, Any]) -> list[Tensor]:
    """Every parameter with the bytes that the files hold for it; `CheckpointError`."""
    from compress_methods.model.skeleton import build_skeleton, checkpoint_names

    skeleton = build_skeleton(path)
    names = checkpoint_names(skeleton, headers)
    below: dict[str, int] = defaultdict(int)
    for name, header in headers.items():
        module, _, leaf = name.rpartition(".")
        if leaf != "bias":
            below[module] += prod(header["shape"]) * itemsize_of(header["dtype"])
    modules: dict[str, list[str]] = defaultdict(list)
    for slot in skeleton.slots.values():
        modules[slot.parameter].append(slot.module)
    found = []
    for name, shape in skeleton.parameter_names().items():
        held = [_held(skeleton, module, below) for module in modules.get(name, ())]
        if held and all(size is not None for size in held):
            size = sum(size for size in held if size is not None)
        elif name in names:
            size = prod(shape) * itemsize_of(headers[names[name]]["dtype"])
        else:
            raise CheckpointError(f"{path}: holds nothing of {name}, which config.json asks for")
        found.append(Tensor(name, tuple(shape), size / prod(shape)))
    return found


def _held(skeleton: Skeleton, module: str, below: Mapping[str, int]) -> int | None:
    """Bytes below a module, whatever prefix the checkpoint's names have."""
    prefix = f"{skeleton.model.base_model_prefix}."
    stored = skeleton.stored_names.of(f"{module}.weight").removesuffix(".weight")
    names = (module, stored, module.removeprefix(prefix), prefix + module)
    return next((below[name] for name in names if name in below), None)
