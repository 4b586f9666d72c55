"""CompressedEmbedding: input embeddings and output heads, tied or not, in any format.

vLLM pads the vocabulary and divides it over ranks; the stored matrix has no padding, so a rank
holds the rows that exist, and the logits of padding are zeros (vLLM cuts them off). A tied head has
no tensors of its own: it takes those of the embedding, once they are prepared.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from compress_methods.errors import CheckpointError
from compress_methods.kernels import Want
from vllm_compress.kernels import ops, runtime
from vllm_compress.layers import collector
from vllm_compress.layers.claims import Claims
from vllm_compress.targets import Target


def is_pooling() -> bool:
    """Whether vLLM runs the model to pool hidden states: it then loads no output head."""
    config = get_current_vllm_config_or_none()
    return config is not None and config.model_config.runner_type == "pooling"


class CompressedEmbedding(QuantizeMethodBase):
    """Made anew for each vocabulary layer."""

    def __init__(self, target: Target, claims: Claims | None = None) -> None:
        self.target = target
        self.format = target.format
        self.collector = collector.Collector([target], claims)
        self.stored = list(target.format.tensors(*target.shape))
        self.owner: tuple[Module, CompressedEmbedding] | None = None
        self.names: list[str] = []
        self.text = ""
        self.product: ops.Product | None = None

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        if self.target.shape != (layer.org_vocab_size, input_size):
            raise CheckpointError(
                f"{self.target.module}: compressed as {list(self.target.shape)}, but the model's "
                f"is [{layer.org_vocab_size}, {input_size}]; config.json and weights disagree"
            )
        self.dtype = params_dtype
        self.is_left_out = isinstance(layer, ParallelLMHead) and is_pooling()
        shard = layer.shard_indices
        self.rows = (shard.org_vocab_start_index, shard.org_vocab_end_index)
        self.pad = layer.num_embeddings_per_partition - (self.rows[1] - self.rows[0])
        collector.check_cuts(self.target, [self.rows], (0, input_size), layer.tp_size)
        self.collector.attach(layer)

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Module:
        owner = embed_tokens.quant_method
        if not isinstance(owner, CompressedEmbedding):
            raise CheckpointError(
                f"{self.target.module} is compressed, but the embedding it is tied to is not"
            )
        self.owner = (embed_tokens, owner)
        for name in self.stored:
            layer.register_parameter(name, getattr(embed_tokens, name))
        return layer

    def process_weights_after_loading(self, layer: Any) -> None:
        if not self.collector.is_waiting:
            return
        if self.is_left_out and not self.collector.found:
            pass
        elif self.owner is not None:
            self._take_from_owner(layer, *self.owner)
        else:
            self._prepare(layer)
        self.collector.close()

    def embedding(self, layer: Any, input_: Tensor) -> Tensor:
        return torch.ops.vllm_compress.embedding(
            input_, self._tensors(layer), self.dtype, self.text
        )

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        assert self.product is not None
        return self.product(x, self._tensors(layer), bias)

    def _tensors(self, layer: Any) -> list[Tensor]:
        return [getattr(layer, name) for name in self.names]

    def _prepare(self, layer: Any) -> None:
        tensors = self.collector.dummy().get(None, {})
        collector.check(self.target, tensors)
        (piece,) = collector.cut(self.target, tensors, [self.rows], (0, self.target.shape[1]))
        piece = piece.to(layer.weight_packed.device)
        runtime.remove(layer, self.stored)
        looked_up = not isinstance(layer, ParallelLMHead)
        want = Want(embed=looked_up, dtype=self.dtype, host=layer, pad=self.pad)
        prepared = runtime.prepare([piece], want)
        self.text, self.product = prepared.text(), ops.product_of(prepared)
        self.names = runtime.install(layer, prepared)

    def _take_from_owner(self, layer: Any, module: Module, owner: CompressedEmbedding) -> None:
        owner.process_weights_after_loading(module)
        self.names, self.text, self.product = owner.names, owner.text, owner.product
        runtime.remove(layer, self.stored)
        runtime.share(layer, module)
