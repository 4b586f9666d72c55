"""Loading a checkpoint into transformers, compressed or not: the reference for every quality
number, and a way to use a compressed model without vLLM (at the memory of the full one)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from compress_methods.compressed import open_compressed, read_entries, read_json
from compress_methods.errors import CheckpointError
from compress_methods.formats import Format
from compress_methods.quantization_config import QUANT_METHOD
from compress_methods.skeleton import build_skeleton, checkpoint_names


def is_compressed(directory: str | Path) -> bool:
    """Whether a directory's config.json names our quant_method."""
    block = read_json(Path(directory) / "config.json").get("quantization_config")
    return isinstance(block, dict) and block.get("quant_method") == QUANT_METHOD


def load_model(directory: str | Path, dtype: torch.dtype = torch.float32) -> Any:
    """A transformers causal LM in eval mode, every compressed matrix unpacked to `dtype`.

    Activations that a format quantizes are quantized here too.
    Raises `CheckpointError` for a damaged directory or a parameter that is not there.
    """
    path = Path(directory)
    skeleton = build_skeleton(path)
    values: dict[str, torch.Tensor] = {}
    if is_compressed(path):
        checkpoint = open_compressed(path)
        entries = dict(checkpoint.dense)
        for matrix in checkpoint.matrices.values():
            weight = matrix.unpack()
            target = skeleton.targets.get(matrix.module)
            if target is not None and target.transposed:
                weight = weight.T.contiguous()
            values[f"{matrix.module}.weight"] = weight.to(dtype)
        known = dict.fromkeys(values) | dict.fromkeys(entries)
        for name, module in skeleton.model.named_modules():
            fmt = checkpoint.spec.format_for(name)
            if fmt is not None and not isinstance(module, nn.Embedding):
                quantize_inputs(module, fmt)
    else:
        entries = read_entries(path)
        known = dict.fromkeys(entries)
    names = checkpoint_names(skeleton, known)
    for name in skeleton.parameter_names():
        if name not in names:
            raise CheckpointError(f"{path}: {name} is missing")
        source = names[name]
        tensor = values[source] if source in values else entries[source].read()
        set_parameter(
            skeleton.model, name, tensor.to(dtype) if tensor.is_floating_point() else tensor
        )
    skeleton.model.tie_weights()
    return skeleton.model.eval()


def quantize_inputs(module: nn.Module, fmt: Format) -> RemovableHandle:
    """Make a linear layer treat its input as the format does (int8 activations)."""
    return module.register_forward_pre_hook(
        lambda _, inputs: (fmt.quantize_activations(inputs[0]), *inputs[1:])
    )


def set_parameter(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Replace a (meta) parameter or buffer by a real tensor of the same shape."""
    owner_name, _, leaf = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    old = getattr(owner, leaf)
    if old.shape != tensor.shape:
        raise CheckpointError(f"{name} is {list(tensor.shape)}, expected {list(old.shape)}")
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor


__all__ = ["is_compressed", "load_model", "set_parameter"]
