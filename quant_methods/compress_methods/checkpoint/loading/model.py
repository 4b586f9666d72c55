"""Loading a checkpoint into transformers, compressed or not: the reference for every quality
number, and a way to use a compressed model without vLLM (at the memory of the full one)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from compress_methods.checkpoint.compressed import CompressedCheckpoint, open_compressed, read_json
from compress_methods.checkpoint.loading.packed import PackedLinear, keep_packed
from compress_methods.checkpoint.loading.tied import open_skeleton
from compress_methods.checkpoint.quantization_config import QUANT_METHOD
from compress_methods.checkpoint.safetensors import Entry
from compress_methods.checkpoint.source import open_source, require_finite
from compress_methods.errors import CheckpointError
from compress_methods.formats import MAIN_TENSOR, Format, torch_dtype
from compress_methods.model.device import resolve_device
from compress_methods.model.experts import is_last, owner_of, treat_inputs
from compress_methods.model.skeleton import Skeleton, set_parameter
from compress_methods.model.slot import Slot


def is_compressed(directory: str | Path) -> bool:
    """Whether a directory's config.json names our quant_method."""
    block = read_json(Path(directory) / "config.json").get("quantization_config")
    return isinstance(block, dict) and block.get("quant_method") == QUANT_METHOD


def load_model(
    directory: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    packed: bool = False,
) -> Any:
    """A transformers model in eval mode on a device, every compressed matrix unpacked to `dtype`;
    `packed`: linear layers stay as they are stored, see `packed.py`.

    Activations that a format quantizes are quantized here too.
    Raises `CheckpointError` for a damaged directory or a parameter that is not there.
    """
    path = Path(directory)
    skeleton = open_skeleton(path)
    place = resolve_device(device)
    source = open_source(path, skeleton, path.name, allow_pickle=False)
    names, gone = skeleton.parameter_names(), dict[str, str]()
    if is_compressed(path):
        if packed:
            gone = keep_packed(skeleton, open_compressed(path).held, place, dtype)
        quantize_activations(skeleton, path)
    elif packed:
        raise CheckpointError(f"{path}: not compressed by vllm-compress, so it cannot stay packed")
    for name in names:
        if name in gone:
            continue
        tensor = source.read(name)
        value = tensor.to(place, dtype) if tensor.is_floating_point() else tensor.to(place)
        set_parameter(skeleton.model, name, value)
    skeleton.model.tie_weights()
    return skeleton.model.to(place).eval()


def require_whole(path: Path) -> None:
    """`CheckpointError` unless every parameter of the model that config.json describes is there.

    One that transformers cannot build here passes: convert needed it, serving may not.
    """
    try:
        skeleton = open_skeleton(path)
    except CheckpointError:
        return
    open_source(path, skeleton, path.name, allow_pickle=False)


def require_finite_values(checkpoint: CompressedCheckpoint, deep: bool = False) -> None:
    """`CheckpointError` names a tensor with NaN or infinity: among scales, biases and norms, which
    are small beside the weights, or among all if `deep`."""
    for matrix in checkpoint.matrices.values():
        for name, entry in matrix.entries.items():
            if deep or name != MAIN_TENSOR:
                _read_finite(entry)
    for entry in checkpoint.dense.values():
        if deep or len(entry.shape) < 2:
            _read_finite(entry)


def _read_finite(entry: Entry) -> None:
    if torch_dtype(entry.dtype).is_floating_point:
        for _, slab in entry.slabs():
            require_finite(entry, slab)


def quantize_activations(skeleton: Skeleton, path: Path) -> None:
    """Hold files against config, and have layers treat their inputs as their formats do."""
    checkpoint = open_compressed(path)
    for name, module in skeleton.model.named_modules():
        fmt = checkpoint.spec.format_for(name)
        if fmt is not None and not isinstance(module, nn.Embedding | PackedLinear):
            quantize_inputs(module, fmt)
    quantize_expert_inputs(skeleton, skeleton.slots.values(), checkpoint.spec.format_for)


def quantize_inputs(module: nn.Module, fmt: Format) -> RemovableHandle:
    """Make a linear layer treat its input as the format does (int8 activations); gradients pass
    through the rounding."""

    def quantized(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x = inputs[0]
        found = fmt.quantize_activations(x)
        if x.requires_grad and found is not x:
            found = found.detach() + (x - x.detach())
        return (found, *inputs[1:])

    return module.register_forward_pre_hook(quantized)


def quantize_expert_inputs(
    skeleton: Skeleton, slots: Iterable[Slot], format_for: Callable[[str], Format | None]
) -> None:
    """The same for the experts among `slots`; `CheckpointError` where those of a layer differ."""
    formats: dict[tuple[str, bool], set[Format | None]] = defaultdict(set)
    for slot in slots:
        if slot.kind == "experts":
            fmt = format_for(slot.module)
            treats = fmt is not None and _treats(fmt, slot.cols)
            formats[owner_of(slot), is_last(slot)].add(fmt if treats else None)
    for (owner, _), found in formats.items():
        if len(found) > 1:
            raise CheckpointError(
                f"{owner}: its experts quantize their inputs in different ways; convert again with "
                "one format for all"
            )
    for owner in {owner for owner, _ in formats}:
        first, inner = (next(iter(formats[owner, side])) for side in (False, True))
        if first is not None or inner is not None:
            module = skeleton.module(owner)
            treat_inputs(module, skeleton.architecture, _treat(first), _treat(inner))


@cache
def _treats(fmt: Format, cols: int) -> bool:
    probe = torch.ones(1, cols)
    return fmt.quantize_activations(probe) is not probe


def _treat(fmt: Format | None) -> Callable[[torch.Tensor], torch.Tensor]:
    return (lambda x: x) if fmt is None else fmt.quantize_activations


__all__ = [
    "is_compressed",
    "load_model",
    "quantize_activations",
    "quantize_expert_inputs",
    "quantize_inputs",
    "require_finite_values",
    "require_whole",
]
