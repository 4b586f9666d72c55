"""CompressConfig: what vLLM asks about a compressed checkpoint.

In the parent, before any worker starts: `from_config` parses the block, `maybe_update_config`
compares the config with the headers of the files and with what vLLM's model class can take. In each
worker: `apply_vllm_mapper` renames modules as the model does, `get_quant_method` picks the layer
method. All it holds is plain data, since vLLM pickles it to its workers.

Errors are `CompressError`s: pydantic wraps ValueErrors into a page, these come out as one line.
Tensor-parallel sizes are not known in the parent; a format that cannot be cut for one fails in the
workers, when the layer is made and before anything is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.model_executor.layers.quantization import (
    QUANTIZATION_METHODS,
    register_quantization_config,
)
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)

if TYPE_CHECKING:
    import torch

    from compress_methods.formats import Format
    from compress_methods.quantization_config import CompressionSpec

QUANT_METHOD = "vllm_compress"


@dataclass(frozen=True)
class Target:
    """A compressed matrix: its Hugging Face module name, [rows, cols] and format."""

    module: str
    shape: tuple[int, int]
    format: Format


class CompressConfig(QuantizationConfig):
    """Formats by module, as vLLM names modules."""

    def __init__(self, spec: CompressionSpec) -> None:
        super().__init__()
        self.spec = spec
        self.targets: dict[str, Target] = {}

    def __repr__(self) -> str:
        formats = ", ".join(fmt.describe() for fmt in self.spec.formats.values())
        return f"CompressConfig({formats}; {len(self.targets)} matrices)"

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        import torch

        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 60

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> None:
        """Asked of every quantized checkpoint: takes none over, offers others a kernel."""
        from vllm_compress.foreign import offer

        if hf_quant_cfg.get("quant_method") != QUANT_METHOD:
            offer()

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> CompressConfig:
        from compress_methods.quantization_config import parse

        return cls(parse(config))

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Check the files, and list every compressed matrix."""
        from vllm_compress.checkpoint import find_targets
        from vllm_compress.model_source import check_vocabulary

        self.targets = find_targets(self.spec, model_name, revision)
        for alias, owner in self.spec.tied.items():
            if owner in self.targets:
                self.targets[alias] = self.targets[owner]
        check_vocabulary(getattr(hf_config, "architectures", None) or [], self)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self.targets = hf_to_vllm_mapper.apply_dict(self.targets)

    def find(self, name: str) -> Target | None:
        """Target of a vLLM module; checkpoints of a base model lack the name's first component."""
        name = name.lstrip(".")
        return self.targets.get(name) or self.targets.get(name.partition(".")[2])

    def fused(self, prefix: str) -> list[Target]:
        """Targets that make up a linear layer, in order; empty where it is kept as it is."""
        from compress_methods.errors import CheckpointError

        whole = self.find(prefix)
        if whole is not None:
            return [whole]
        parent, _, last = prefix.rpartition(".")
        parts = self.packed_modules_mapping.get(last, [])
        names = [f"{parent}.{part}" if parent else part for part in parts]
        found = [self.find(name) for name in names]
        if len({None if t is None else t.format for t in found}) > 1:
            kinds = ", ".join(
                f"{part} is {'kept as it is' if t is None else t.format.describe()}"
                for part, t in zip(parts, found, strict=True)
            )
            raise CheckpointError(
                f"{prefix}: vLLM makes one layer of {', '.join(parts)}, which must share a "
                f"format; {kinds}"
            )
        return [t for t in found if t is not None]

    def embedding(self, prefix: str, is_head: bool) -> Target | None:
        """Target of a vocabulary layer; several models give their embedding no name."""
        if prefix or is_head:
            return self.find(prefix)
        return next((t for t in self.targets.values() if t.module == self.spec.embedding), None)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        from vllm.model_executor.layers.fused_moe import RoutedExperts
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
        from vllm.model_executor.layers.vocab_parallel_embedding import (
            ParallelLMHead,
            VocabParallelEmbedding,
        )

        if isinstance(layer, LinearBase):
            targets = self.fused(prefix)
            if not targets:
                return UnquantizedLinearMethod()
            from vllm_compress.layers.linear import CompressedLinear

            return CompressedLinear(targets)
        if isinstance(layer, VocabParallelEmbedding):
            target = self.embedding(prefix, isinstance(layer, ParallelLMHead))
            if target is None:
                return None
            from vllm_compress.layers.embedding import CompressedEmbedding

            return CompressedEmbedding(target)
        if isinstance(layer, RoutedExperts):
            self._refuse_experts(prefix)
        return None

    def _refuse_experts(self, prefix: str) -> None:
        from compress_methods.errors import CheckpointError

        name = next((n for n in self.targets if n.startswith(prefix.lstrip(".") + ".")), None)
        if name is not None:
            raise CheckpointError(
                f"{self.targets[name].module}: compressed experts are not served yet; convert "
                "again with a rule that keeps the experts as they are"
            )


def register_config() -> None:
    """Enter CompressConfig under its name, once per process."""
    if QUANT_METHOD not in QUANTIZATION_METHODS:
        register_quantization_config(QUANT_METHOD)(CompressConfig)


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
