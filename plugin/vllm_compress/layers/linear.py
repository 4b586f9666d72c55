"""CompressedLinear: one method for every linear layer of vLLM and every format.

Column, row, merged, QKV and replicated layers differ only in their `Geometry`. Fails, in one line,
where a tensor is missing or has another shape than declared, and where a format cannot be cut for
the tensor-parallel size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.linear import LinearMethodBase

from compress_methods.errors import CheckpointError
from vllm_compress.config import Target
from vllm_compress.layers import loading, ops, vllm_kernels
from vllm_compress.layers.geometry import Geometry, linear_geometry


class CompressedLinear(LinearMethodBase):
    """Made anew for each layer, of the one or more matrices stored for it."""

    def __init__(self, targets: list[Target]) -> None:
        self.targets = targets
        self.format = targets[0].format
        self.collector: loading.Collector | None = loading.Collector(targets)
        self.names: list[str] = []
        self.product: ops.Product | None = None
        self.vllm_kernel: vllm_kernels.VllmKernel | None = None

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
        assert self.collector is not None
        self.geometry = linear_geometry(layer)
        self.dtype = params_dtype
        self._check_shapes()
        for target, covered in self._expected():
            loading.check_cuts(
                target, self.geometry.row_ranges(covered), self.geometry.col_range, layer.tp_size
            )
        self.collector.attach(layer)

    def process_weights_after_loading(self, layer: Any) -> None:
        if self.collector is None:
            return
        pieces, cols = self._pieces(layer.weight_packed.device)
        stored = list(self.format.tensors(*self.targets[0].shape))
        self.vllm_kernel = vllm_kernels.build(layer, self.format, pieces, cols, self.dtype, stored)
        if self.vllm_kernel is None:
            plan, tensors = loading.prepare(self.format, pieces, cols)
            self.product = ops.product_of(plan, tensors)
            self.names = loading.install(layer, stored, tensors)
        self.collector = None

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if self.vllm_kernel is not None:
            return self.vllm_kernel.apply(layer, x, bias)
        assert self.product is not None
        return self.product(x, [getattr(layer, name) for name in self.names], bias)

    def _pieces(self, device: torch.device) -> tuple[list[loading.Matrix], int]:
        """This rank's matrices on its device, joined where possible, and their columns."""
        assert self.collector is not None
        geometry: Geometry = self.geometry
        pieces: list[loading.Matrix] = []
        for target, covered, tensors in self.collector.matrices(geometry):
            loading.check(target, tensors)
            ranges = geometry.row_ranges(covered)
            for piece, rows in loading.cut(target, tensors, ranges, geometry.col_range):
                pieces.append(({name: t.to(device) for name, t in piece.items()}, rows))
        cols = geometry.col_range[1] - geometry.col_range[0]
        return loading.join(self.format, pieces, cols), cols

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
