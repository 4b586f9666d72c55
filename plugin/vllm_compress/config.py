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

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vllm.model_executor.layers.quantization import (
    QUANTIZATION_METHODS,
    register_quantization_config,
)
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)

from vllm_compress.layers.claims import Claims
from vllm_compress.names import QUANT_METHOD

if TYPE_CHECKING:
    import torch

    from compress_methods.checkpoint.quantization_config import CompressionSpec
    from vllm_compress.layers.linear import Made
    from vllm_compress.targets import Target


FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
"""What is in vLLM's fused layers, for model classes that do not say it (GPT-J, StableLM)."""
QKV = 3


class CompressConfig(QuantizationConfig):
    """Formats by module, as vLLM names modules."""

    def __init__(self, spec: CompressionSpec) -> None:
        super().__init__()
        self.spec = spec
        self.targets: dict[str, Target] = {}
        self.made: Made = {}
        self.renamed: dict[str, str] = {}
        self.fused_parts = dict(FUSED)
        self.claims = Claims()

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
        from vllm_compress.kernels.third_party import offer

        if hf_quant_cfg.get("quant_method") != QUANT_METHOD:
            offer()

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> CompressConfig:
        from compress_methods.checkpoint.quantization_config import parse

        return cls(parse(config))

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Check the files, and list every compressed matrix."""
        from compress_methods.model.architecture import architecture_of
        from vllm_compress.model_classes import (
            check_rows,
            check_vocabulary,
            choose_classes,
            is_draft,
            warn_unproven,
        )
        from vllm_compress.targets import find_targets

        self.targets = find_targets(self.spec, model_name, revision)
        if hf_config is not None:
            row = architecture_of(hf_config)
            self.renamed = dict(row.vllm_names)
            qkv = next((list(parts) for parts in row.fused if len(parts) == QKV), None)
            self.fused_parts |= {} if qkv is None else {"qkv_proj": qkv}
            self.targets = check_rows(self.targets, hf_config)
        for alias, owner in self.spec.tied.items():
            if owner in self.targets:
                self.targets[alias] = replace(self.targets[owner], shared=True)
        names = getattr(hf_config, "architectures", None) or []
        check_vocabulary(names, self)
        if hf_config is not None and not is_draft(names):
            self._expect_claims()
            warn_unproven(hf_config)
            choose_classes(hf_config)

    def _expect_claims(self) -> None:
        """All but tied heads, for which some models run the embedding itself."""
        tied = {alias for alias, owner in self.spec.tied.items() if owner == self.spec.embedding}
        self.claims.expect(t for name, t in self.targets.items() if name not in tied)

    def get_cache_scale_mapper(self) -> Any:
        """Asked for by vLLM's loader before the first tensor, when the model is built."""
        self.claims.check()
        return super().get_cache_scale_mapper()

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        from compress_methods.formats import MAIN_TENSOR

        # Rules are for tensors: one for the end of a name may mean a matrix that is kept.
        tail = f".{MAIN_TENSOR}"
        tensors = {f"{name}{tail}": target for name, target in self.targets.items()}
        mapped = hf_to_vllm_mapper.apply_dict(tensors)
        self.targets = {name.removesuffix(tail): target for name, target in mapped.items()}

    def find(self, name: str) -> Target | None:
        """Target of a vLLM module; checkpoints of a base model lack the name's first component."""
        name = name.lstrip(".")
        return self.targets.get(name) or self.targets.get(name.partition(".")[2])

    def fused(self, prefix: str) -> list[Target]:
        """Targets that make up a linear layer, in order; empty where it is kept as it is."""
        from compress_methods.errors import CheckpointError

        for theirs, ours in self.renamed.items():
            if not theirs.startswith("^"):
                prefix = prefix.replace(theirs, ours)
            elif prefix.startswith(theirs[1:]):
                prefix = ours + prefix.removeprefix(theirs[1:])
        whole = self.find(prefix)
        if whole is not None:
            return [whole]
        parent, _, last = prefix.rpartition(".")
        parts = self.packed_modules_mapping.get(last) or self.fused_parts.get(last, [])
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
        from vllm.model_executor.layers.attention import Attention
        from vllm.model_executor.layers.fused_moe import RoutedExperts
        from vllm.model_executor.layers.linear import LinearBase
        from vllm.model_executor.layers.vocab_parallel_embedding import (
            ParallelLMHead,
            VocabParallelEmbedding,
        )

        if isinstance(layer, LinearBase):
            targets = self.fused(prefix)
            from vllm_compress.layers.linear import CompressedLinear, KeptLinear

            if not targets:
                return KeptLinear(self.claims)
            self.claims.add(targets)
            return CompressedLinear(targets, self.made, self.claims)
        if isinstance(layer, VocabParallelEmbedding):
            target = self.embedding(prefix, isinstance(layer, ParallelLMHead))
            if target is None:
                return None
            from vllm_compress.layers.embedding import CompressedEmbedding

            self.claims.add([target])
            return CompressedEmbedding(target, self.claims)
        if self.spec.kv_cache is not None and isinstance(layer, Attention):
            from vllm_compress.layers.kv_cache import KeptScales

            return KeptScales(self, prefix)
        if isinstance(layer, RoutedExperts):
            matrices = self.experts(prefix, layer)
            if matrices:
                from vllm_compress.layers.handed_experts import experts_method

                self.claims.add(matrices.values())
                return experts_method(matrices, layer.moe_config, self.claims, prefix)
        return None

    def experts(self, prefix: str, layer: Any) -> dict[tuple[int, str], Target]:
        """Targets of a layer of experts by number and vLLM's name for the matrix; all or none."""
        from compress_methods.errors import CheckpointError

        names = {
            "w1": layer.ckpt_gate_proj_name,
            "w2": layer.ckpt_down_proj_name,
            "w3": layer.ckpt_up_proj_name,
        }
        wanted = {
            (expert, shard): f"{prefix}.{expert}.{name}"
            for expert in range(layer.moe_config.num_logical_experts)
            for shard, name in names.items()
            if name is not None
        }
        found = {place: self.find(name) for place, name in wanted.items()}
        held = {place: target for place, target in found.items() if target is not None}
        if held and len(held) < len(found):
            kept = next(name for place, name in wanted.items() if place not in held)
            raise CheckpointError(
                f"{kept} is kept as it is, but {next(iter(held.values())).module} is compressed; "
                "vLLM makes one layer of all experts, so they must go together"
            )
        return held


def register_config() -> None:
    """Enter CompressConfig under its name, once per process."""
    if QUANT_METHOD not in QUANTIZATION_METHODS:
        register_quantization_config(QUANT_METHOD)(CompressConfig)
