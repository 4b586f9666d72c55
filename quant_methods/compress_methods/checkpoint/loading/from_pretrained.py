"""transformers' `from_pretrained` on a compressed directory: every matrix unpacked after loading.

Registered when transformers first reads its table of quantizers, if `compress_methods` is imported
by then. The result is a plain model that computes what `load_model` does.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from compress_methods.names import QUANT_METHOD


class CompressedWeights(QuantizationConfigMixin):
    """The `quantization_config` of a compressed checkpoint, as it is."""

    def __init__(self, **block: Any) -> None:
        self.quant_method = QUANT_METHOD
        self.__dict__.update(block)


class Unpacker(HfQuantizer):
    """Loads what is stored densely as transformers does, then fills in the unpacked matrices."""

    @property
    def is_trainable(self) -> bool:
        return True

    def is_serializable(self) -> bool:
        return True

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Any = None, **kwargs: Any
    ) -> None:
        from compress_methods.checkpoint.compressed import open_compressed
        from compress_methods.errors import CheckpointError

        if not checkpoint_files:
            raise CheckpointError("a compressed checkpoint is loaded from its safetensors files")
        self.checkpoint = open_compressed(Path(checkpoint_files[0]).parent)
        stored = {f".{name}" for m in self.checkpoint.matrices.values() for name in m.entries}
        # What is packed is neither missing nor unexpected: it comes in afterwards.
        model._keys_to_ignore_on_load_unexpected = {
            *(model._keys_to_ignore_on_load_unexpected or ()),
            *(f"{re.escape(ending)}$" for ending in stored),
        }
        model._keys_to_ignore_on_load_missing = {
            *(model._keys_to_ignore_on_load_missing or ()),
            *(f"{re.escape(parameter)}$" for parameter in self._parameters(model)),
        }

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        import torch
        from torch import nn

        from compress_methods.checkpoint.loading.model import (
            quantize_expert_inputs,
            quantize_inputs,
        )
        from compress_methods.model.skeleton import Skeleton

        formats = {}
        slots = self._slots(model)
        with torch.no_grad():
            for name, matrix in self.checkpoint.held.items():
                slot = slots.get(name)
                if slot is None:
                    continue  # a head that this class of model does not have
                slot.write(model, matrix.unpack())
                formats[slot.module] = matrix.format
                module = model.get_submodule(slot.module) if slot.is_plain else None
                if module is not None and not isinstance(module, nn.Embedding):
                    quantize_inputs(module, matrix.format)
        skeleton = Skeleton(model)
        quantize_expert_inputs(skeleton, skeleton.slots.values(), formats.get)
        self.remove_quantization_config(model)
        for module in model.modules():
            if getattr(getattr(module, "config", None), "_is_quantized", False):
                module.config._is_quantized = False
        return model

    def _parameters(self, model: Any) -> list[str]:
        slots = self._slots(model)
        return [slots[name].parameter for name in self.checkpoint.held if name in slots]

    def _slots(self, model: Any) -> dict[str, Any]:
        """Slots by the names the checkpoint has for them, with or without the base's prefix."""
        from compress_methods.model.skeleton import Skeleton

        prefix = f"{model.base_model_prefix}."
        found = Skeleton(model).slots
        shorter = {name.removeprefix(prefix): slot for name, slot in found.items()}
        return {f"{prefix}{name}": slot for name, slot in found.items()} | shorter | found


def register() -> None:
    """Make transformers know the method; may be called any number of times."""
    AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(QUANT_METHOD, CompressedWeights)
    AUTO_QUANTIZER_MAPPING.setdefault(QUANT_METHOD, Unpacker)
