"""CompressedExperts: one method for vLLM's layers of routed experts and every format.

Each expert's gate and up matrices become one, its down matrix the other; tensor parallelism cuts
them as those of a dense layer, expert parallelism gives a rank whole experts. Router, shared
experts and the sum over ranks are vLLM's own. On CPUs the product is ours (`kernels/experts.py`),
elsewhere vLLM's (`handed_experts.py`). Fails, in one line, where experts have an activation that is
not known and where a format cannot be cut; `CompressConfig.experts` has refused layers of which
only some experts are compressed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase

from compress_methods.errors import CheckpointError
from compress_methods.formats import Stored, torch_dtype
from compress_methods.kernels import Prepared, Want
from vllm_compress.kernels import experts as products
from vllm_compress.kernels import runtime
from vllm_compress.kernels.worker import prepare_worker
from vllm_compress.layers import collector
from vllm_compress.layers.claims import Claims
from vllm_compress.targets import Target

GATE, UP, DOWN = "w1", "w3", "w2"
"""vLLM's names for an expert's matrices. Without gates the only other one is called `w1`."""
PREFIXES = {GATE: "w13_", UP: "w13_", DOWN: "w2_"}
BIASES = ("w13_bias", "w2_bias")
IN_CHECKPOINTS, IN_VLLM = ".mlp.experts.", ".mlp.experts.routed_experts."
"""Where GPT-OSS has experts."""
Place = tuple[int, str]


class LoadedExperts:
    """The matrices of a layer's experts as they come from the checkpoint, each kept until all are
    there. What is made of them is another class's matter."""

    moe: Any

    def begin(self, targets: Mapping[Place, Target], claims: Claims | None) -> None:
        """What a constructor does."""
        self.targets, self.claims = dict(targets), claims
        self.found: dict[Place, dict[str, Tensor]] | None = {}

    def maybe_roundup_sizes(
        self, hidden_size: int, intermediate_size_per_partition: int, *_: Any, **__: Any
    ) -> tuple[int, int]:
        return hidden_size, intermediate_size_per_partition

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        prepare_worker()
        self.dtype, self.dummy = params_dtype, collector.is_dummy()
        rank, ranks = self.moe.tp_rank, self.moe.tp_size
        size = intermediate_size_per_partition
        self.inner, self.hidden = (rank * size, (rank + 1) * size), hidden_size
        self._check(layer, size * ranks)
        for target in {(t.format, t.shape): t for t in self._of(GATE, UP)}.values():
            collector.check_cuts(target, [self.inner], (0, hidden_size), ranks)
        for target in {(t.format, t.shape): t for t in self._of(DOWN)}.values():
            collector.check_cuts(target, [(0, hidden_size)], self.inner, ranks)
        if not self.moe.has_bias:
            self._attach(layer)
            return
        self._attach_by_name(layer)
        for name, outputs in zip(BIASES, (2 * size, hidden_size), strict=True):
            empty = torch.zeros(num_experts, outputs, dtype=params_dtype)
            layer.register_parameter(name, Parameter(empty, requires_grad=False))

    def _of(self, *shards: str) -> Iterator[Target]:
        return (target for (_, shard), target in self.targets.items() if shard in shards)

    def _check(self, layer: Any, inner: int) -> None:
        """What is not served, and shapes."""
        module = next(iter(self.targets.values())).module
        activation = layer.activation.value
        self.check_activation(module, activation)
        for (_, shard), target in self.targets.items():
            shape = (self.hidden, inner) if shard == DOWN else (inner, self.hidden)
            if target.shape != shape:
                raise CheckpointError(
                    f"{target.module}: compressed as {list(target.shape)}, but the model's is "
                    f"{list(shape)}; config.json and weights disagree"
                )

    def check_activation(self, module: str, activation: str) -> None:
        """Raise `CheckpointError` where what lies between the matrices is not known."""

    def _attach(self, layer: Any) -> None:
        """Register an empty parameter for each stored tensor, whose loader keeps the tensor."""
        for (_, shard), target in self.targets.items():
            for name, spec in target.format.tensors(*target.shape).items():
                if not hasattr(layer, PREFIXES[shard] + name):
                    dtype = torch_dtype(spec.dtype)
                    empty = Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
                    empty.weight_loader = self._loader(layer, name)  # type: ignore[attr-defined]
                    layer.register_parameter(PREFIXES[shard] + name, empty)

    def _attach_by_name(self, layer: Any) -> None:
        """The same for the one model with biases, GPT-OSS, whose loader looks whole names up: each
        expert's matrices get a room of their own. Its names for the checkpoint's tensors, which it
        has for those of all experts at once, say where that is until all are loaded."""
        gpt_oss_names()[IN_CHECKPOINTS] = IN_VLLM
        for (expert, shard), target in self.targets.items():
            number, name = target.module.rsplit(".", 2)[1:]
            if number not in layer._modules:
                layer.add_module(number, Module())
            room = Module()
            layer.get_submodule(number).add_module(name, room)
            for tensor, spec in target.format.tensors(*target.shape).items():
                dtype = torch_dtype(spec.dtype)
                empty = Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
                keep = self._loader(layer, tensor)
                empty.weight_loader = partial(  # type: ignore[attr-defined]
                    keep, weight_name=tensor, shard_id=shard, expert_id=expert
                )
                room.register_parameter(tensor, empty)

    def _loader(self, layer: Any, name: str) -> Any:
        def load(
            param: Parameter,
            loaded_weight: Tensor,
            weight_name: str,
            shard_id: str,
            expert_id: int,
            return_success: bool = False,
        ) -> bool | None:
            if self.found is None:
                module = next(iter(self.targets.values())).module
                raise CheckpointError(
                    f"{module}: compressed experts cannot be reloaded in place; restart the server"
                )
            if self.claims is not None:
                self.claims.check()
            mine = layer._map_global_expert_id_to_local_expert_id(expert_id) >= 0
            if mine:
                self.found.setdefault((expert_id, shard_id), {})[name] = loaded_weight
            return mine if return_success else None

        return load

    def _numbers(self) -> list[int]:
        return sorted({expert for expert, _ in self.targets})

    def _local(self, layer: Any, expert: int) -> int:
        return int(layer._map_global_expert_id_to_local_expert_id(expert))

    def here(self, layer: Any) -> list[int]:
        """Numbers of the experts that this rank has, by their places."""
        mine = [e for e in self._numbers() if self._local(layer, e) >= 0]
        return sorted(mine, key=lambda expert: self._local(layer, expert))

    def let_go(self, layer: Any) -> torch.device:
        """Remove what tensors were loaded through; returns the device of the layer."""
        device: torch.device = next(layer.parameters()).device
        runtime.remove(
            layer, [n for n, _ in layer.named_parameters(recurse=False) if n not in BIASES]
        )
        for number in self._numbers():
            layer._modules.pop(str(number), None)
        return device

    def piece(self, expert: int, shard: str, device: torch.device) -> Stored:
        assert self.found is not None
        target = self.targets[expert, shard]
        tensors = self.found.pop((expert, shard), {})
        if self.dummy and not tensors:
            tensors = collector.zeros(target)
        collector.check(target, tensors)
        whole = (0, self.hidden)
        rows, cols = (whole, self.inner) if shard == DOWN else (self.inner, whole)
        (piece,) = collector.cut(target, tensors, [rows], cols)
        return piece.to(device)


class CompressedExperts(LoadedExperts, FusedMoEMethodBase):
    """Made anew for each layer, of the matrices of all its experts."""

    def __init__(
        self, targets: Mapping[Place, Target], moe: Any, claims: Claims | None = None
    ) -> None:
        super().__init__(moe)
        self.begin(targets, claims)
        self.names: list[str] = []
        self.plan = ""

    def check_activation(self, module: str, activation: str) -> None:
        if activation not in products.ACTIVATIONS or self.moe.swiglu_limit is not None:
            raise CheckpointError(
                f"{module}: compressed experts with activation {activation!r}"
                + (" and a limit" if self.moe.swiglu_limit is not None else "")
                + f" are not served, only {', '.join(products.ACTIVATIONS)}"
            )

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        return None

    def process_weights_after_loading(self, layer: Any) -> None:
        if self.found is None:
            return
        here, device = self.here(layer), self.let_go(layer)
        prepared = (self._prepared(expert, device) for expert in here)
        plan, tensors = products.stack(prepared, len(here))
        if self.moe.has_bias:
            gpt_oss_names().pop(IN_CHECKPOINTS, None)
            first, last = (layer.get_parameter(name) for name in BIASES)
            # Biases of gates and of what they gate take turns; their matrices do not.
            first.data = torch.cat([first[:, ::2], first[:, 1::2]], 1).float()
            last.data = last.float()
        plan = replace(
            plan,
            activation=layer.activation.value,
            on_input=bool(layer.apply_router_weight_on_input),
        )
        self.plan = plan.text()
        self.names = [f"experts_{i}" for i in range(len(tensors))]
        for name, tensor in zip(self.names, tensors, strict=True):
            layer.register_parameter(name, Parameter(tensor, requires_grad=False))
        self.found = None

    def _prepared(self, expert: int, device: torch.device) -> tuple[Prepared, Prepared]:
        """This rank's part of an expert; what was loaded of it is let go."""
        shards = [shard for shard in (GATE, UP) if (expert, shard) in self.targets]
        rows = [self.piece(expert, shard, device) for shard in shards]
        want = Want(dtype=self.dtype)
        first = runtime.prepare(runtime.join(rows), want)
        return first, runtime.prepare([self.piece(expert, DOWN, device)], want)

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any = None,
        shared_experts_input: Tensor | None = None,
    ) -> Tensor:
        tensors = [getattr(layer, name) for name in self.names]
        biases = [getattr(layer, name) for name in BIASES] if self.moe.has_bias else []
        found: Tensor = torch.ops.vllm_compress.experts(
            x, topk_weights, topk_ids, tensors, biases, layer.expert_map, self.plan
        )
        return found


def gpt_oss_names() -> dict[str, str]:
    """What vLLM's class for GPT-OSS puts in place of parts of the names of tensors."""
    from vllm.model_executor.models.gpt_oss import GptOssForCausalLM

    names: dict[str, str] = GptOssForCausalLM.hf_to_vllm_mapper.orig_to_new_substr
    return names
