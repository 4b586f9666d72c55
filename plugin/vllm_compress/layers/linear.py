"""CompressedLinear: one method for every linear layer of vLLM and every format.

Column, row, merged, QKV and replicated layers differ only in their `Geometry`. A layer that shares
the weights of another has no tensors of its own: it takes those once they are prepared. Fails, in
one line, where a tensor is missing or has another shape than declared, and where a format cannot be
cut for the tensor-parallel size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.linear import LinearMethodBase, UnquantizedLinearMethod

from compress_methods.errors import CheckpointError
from compress_methods.formats import Stored
from compress_methods.kernels import Want
from vllm_compress.kernels import ops, runtime
from vllm_compress.layers import collector
from vllm_compress.layers.claims import Claims
from vllm_compress.layers.geometry import Geometry, linear_geometry
from vllm_compress.targets import Target

Made = dict[tuple[str, ...], tuple[Any, "CompressedLinear"]]
"""Layers of this process with their methods, by the modules they hold."""


class KeptLinear(UnquantizedLinearMethod):
    """A linear layer that is kept as it is: after loading it asks whether some other layer should
    have been compressed, where vLLM's class has dropped the tensors without a word."""

    def __init__(self, claims: Claims) -> None:
        super().__init__()
        self.claims = claims

    def process_weights_after_loading(self, layer: Any) -> None:
        self.claims.check()
        super().process_weights_after_loading(layer)


class CompressedLinear(LinearMethodBase):
    """Made anew for each layer, of the one or more matrices stored for it."""

    def __init__(self, targets: list[Target], made: Made, claims: Claims | None = None) -> None:
        self.targets, self.made = targets, made
        self.format = targets[0].format
        self.collector = collector.Collector(targets, claims)
        self.names: list[str] = []
        self.product: ops.Product | None = None

    @property
    def key(self) -> tuple[str, ...]:
        """Modules whose tensors the layer holds, or shares."""
        return tuple(target.module for target in self.targets)

    @property
    def shares(self) -> bool:
        """Whether the tensors are another layer's."""
        return self.targets[0].shared

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
        self.geometry = linear_geometry(layer)
        self.dtype = params_dtype
        # Measured over two ranks: off by 0.9 nats with two groups, and other rows with one.
        if layer.tp_size > 1 and getattr(layer, "prefix", "").endswith("mixer.in_proj"):
            raise CheckpointError(
                f"{self.targets[0].module}: a compressed Mamba-2 is not served over several ranks; "
                "use tensor-parallel size 1 or keep in_proj as it is"
            )
        self._check_shapes()
        for target, covered in self._expected():
            collector.check_cuts(
                target, self.geometry.row_ranges(covered), self.geometry.col_range, layer.tp_size
            )
        if not self.shares:
            self.made[self.key] = (layer, self)
            self.collector.attach(layer)

    def process_weights_after_loading(self, layer: Any) -> None:
        if not self.collector.is_waiting:
            return
        if self.shares:
            self._take_from_owner(layer)
        else:
            pieces = self._pieces(layer.weight_packed.device)
            runtime.remove(layer, list(self.format.tensors(*self.targets[0].shape)))
            prepared = runtime.prepare(pieces, Want(dtype=self.dtype, host=layer))
            self.product = ops.product_of(prepared)
            self.names = runtime.install(layer, prepared)
        self.collector.close()

    def _take_from_owner(self, layer: Any) -> None:
        if self.key not in self.made:
            raise CheckpointError(
                f"{layer.prefix}: shares the weights of {', '.join(self.key)}, which another "
                "pipeline rank has; use a smaller pipeline-parallel size"
            )
        module, owner = self.made[self.key]
        owner.process_weights_after_loading(module)
        self.names, self.product = owner.names, owner.product
        runtime.share(layer, module)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        assert self.product is not None
        return self.product(x, [getattr(layer, name) for name in self.names], bias)

    def _pieces(self, device: torch.device) -> list[Stored]:
        """This rank's matrices on its device, joined where possible."""
        geometry: Geometry = self.geometry
        pieces: list[Stored] = []
        for target, covered, tensors in self.collector.matrices(geometry):
            collector.check(target, tensors)
            ranges = geometry.row_ranges(covered)
            for piece in collector.cut(target, tensors, ranges, geometry.col_range):
                pieces.append(piece.to(device))
        return runtime.join(pieces)

    def _expected(self) -> list[tuple[Target, range]]:
        """Targets with the segments they hold, where the names tell."""
        count = len(self.geometry.segments)
        if len(self.targets) == 1:
            return [(self.targets[0], range(count))]
        if len(self.targets) == count:
            return [(target, range(i, i + 1)) for i, target in enumerate(self.targets)]
        return []

    def _check_shapes(self) -> None:
        for target, covered in self._expected():
            rows = sum(self.geometry.segments[i].rows for i in covered)
            if target.shape != (rows, self.geometry.cols):
                raise CheckpointError(
                    f"{target.module}: compressed as {list(target.shape)}, but the model's is "
                    f"[{rows}, {self.geometry.cols}]; config.json and weights disagree"
                )
